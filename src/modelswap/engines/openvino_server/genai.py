"""The real pipeline: OpenVINO GenAI. Importing this module loads the library.

Seen with 2026.4.1 and SmolLM2-135M on 2 cores: loading a GGUF file converts and compiles it each time (3.0 s). With
the converted model and its compiled form kept on disk it loads in 0.45 s, and answers the same. The compiled form is
taken up only with the SDPA attention backend; with the default one, loading stays at 1.7 s.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import openvino_genai

from modelswap.engines.openvino_server import gguf, store
from modelswap.engines.openvino_server.pipeline import CannotLoad, InvalidPrompt, Params, Prompt, Result
from modelswap.engines.openvino_server.text import Detokenizer

_IR = "openvino_model.xml"


class Options(msgspec.Struct, frozen=True):
    """``threads`` 0 leaves their number to OpenVINO; without a ``cache`` every start converts and compiles anew."""

    device: str = "CPU"
    threads: int = 0
    cache: Path | None = None


class GenAi:
    """A loaded model with its ``tokenizer``; ``context`` is its context length in tokens, where known."""

    def __init__(self, pipeline: Any, context: int | None) -> None:
        self._pipeline = pipeline
        self.tokenizer = pipeline.get_tokenizer()
        self.context = context

    def generate(self, prompt: Prompt, params: Params, on_text: Callable[[str], bool]) -> Result:
        """See `Pipeline.generate`."""
        inputs = self._encode(prompt)
        length = int(inputs.input_ids.shape[1])
        if length == 0:
            raise InvalidPrompt("the prompt is empty")
        if self.context is not None and length >= self.context:
            raise InvalidPrompt(f"the prompt's {length} tokens don't fit the model's context of {self.context}")
        room = params.max_tokens if self.context is None else min(params.max_tokens, self.context - length)
        streamer = _Streamer(Detokenizer(self.decode), on_text)
        results = self._pipeline.generate(inputs, self._config(params, room), streamer)
        if not streamer.stopped and (rest := streamer.detokenizer.flush()):
            on_text(rest)
        limited = results.finish_reasons[0] == openvino_genai.GenerationFinishReason.LENGTH
        return Result("length" if limited else "stop", length, len(results.tokens[0]))

    def _encode(self, prompt: Prompt) -> Any:
        if not prompt.messages:
            return self.tokenizer.encode(prompt.text)
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
        try:
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        except RuntimeError as error:
            raise InvalidPrompt(f"the model's chat template refuses these messages: {error}") from error
        # The template has put in the special tokens itself.
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the tokens' text, without special tokens and without an incomplete character at the end."""
        return str(self.tokenizer.decode(list(tokens)))

    def _config(self, params: Params, room: int) -> Any:
        config = self._pipeline.get_generation_config()
        config.max_new_tokens = room
        if params.temperature is not None:
            config.do_sample = params.temperature > 0
            config.temperature = params.temperature or 1.0
        elif params.top_p is not None or params.top_k is not None:
            config.do_sample = True
        if config.do_sample:
            config.rng_seed = secrets.randbits(32) if params.seed is None else params.seed % 2**32
            if params.top_p is not None:
                config.top_p = params.top_p
            if params.top_k is not None:
                config.top_k = params.top_k
        if params.presence_penalty is not None:
            config.presence_penalty = params.presence_penalty
        if params.frequency_penalty is not None:
            config.frequency_penalty = params.frequency_penalty
        return config


class _Streamer(openvino_genai.StreamerBase):  # type: ignore[misc] # the library publishes no types
    def __init__(self, detokenizer: Detokenizer, on_text: Callable[[str], bool]) -> None:
        super().__init__()
        self.detokenizer = detokenizer
        self.stopped = False
        self._on_text = on_text

    def write(self, tokens: int | Sequence[int]) -> openvino_genai.StreamingStatus:
        for token in [tokens] if isinstance(tokens, int) else tokens:
            if not self._on_text(self.detokenizer.push(token)):
                self.stopped = True
                return openvino_genai.StreamingStatus.CANCEL
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing is held here; `GenAi.generate` flushes."""


def load(model: Path, options: Options) -> GenAi:
    """Load a GGUF file or an IR folder; raises `CannotLoad`."""
    try:
        if model.is_dir():
            if not (model / _IR).is_file():
                raise CannotLoad(f"the folder holds no {_IR} (give an OpenVINO IR folder or a .gguf file)")
            context = _ir_context(model)
        else:
            context = gguf.read(model).context
        return GenAi(_cached(model, options, context) or _open(model, options), context)
    except FileNotFoundError:
        raise CannotLoad("there is no such file or folder") from None
    except MemoryError:
        raise CannotLoad("out of host memory") from None
    except (OSError, RuntimeError) as error:
        raise CannotLoad(f"{error}") from error


def _open(model: Path, options: Options, **properties: Any) -> Any:
    if options.threads:
        properties["INFERENCE_NUM_THREADS"] = options.threads
    return openvino_genai.LLMPipeline(model, options.device, ATTENTION_BACKEND="SDPA", **properties)


def _cached(model: Path, options: Options, context: int | None) -> Any:
    """Load by way of the cache, filling it; None if that can't be done."""
    if options.cache is None:
        return None
    try:
        source = model / _IR if model.is_dir() else model
        folder = options.cache / store.identity(source, openvino_genai.__version__)
        if model.is_dir():
            return _compiled(model, folder, options)
        converted = store.Folder(folder / "model")
        if converted.facts() is not None:
            return _compiled(converted.path, folder, options)
        with converted.fill({"source": str(model.resolve()), "context": context}) as unfinished:
            link = unfinished / "source.gguf"
            link.symlink_to(model.resolve())
            pipeline = _open(link, options, enable_save_ov_model=True)
            link.unlink()
        _forget_older(folder, str(model.resolve()))
    except BlockingIOError:
        sys.stderr.write(f"another process is filling the cache in {options.cache}: doing without it\n")
        return None
    except (OSError, RuntimeError) as error:
        sys.stderr.write(f"not using the cache in {options.cache}: {error}\n")
        return None
    return pipeline


def _compiled(model: Path, folder: Path, options: Options) -> Any:
    # The number of threads makes no difference to the compiled form.
    compiled = store.Folder(folder / f"compiled-{options.device}")
    if compiled.facts() is not None:
        try:
            return _open(model, options, CACHE_DIR=str(compiled.path))
        except RuntimeError:
            compiled.discard()
            raise
    with compiled.fill({}) as unfinished:
        return _open(model, options, CACHE_DIR=str(unfinished))


def _forget_older(folder: Path, source: str) -> None:
    """Remove what was made of earlier states of the same file."""
    for other in folder.parent.iterdir():
        facts = store.Folder(other / "model").facts()
        if other != folder and facts is not None and facts.get("source") == source:
            store.Folder(other).discard()


def _ir_context(model: Path) -> int | None:
    try:
        config = msgspec.json.decode((model / "config.json").read_bytes())
    except (OSError, msgspec.DecodeError):
        return None
    context = config.get("max_position_embeddings") if isinstance(config, dict) else None
    return context if isinstance(context, int) else None
