"""What the embedded server reads from and keeps on disk: GGUF heads, the store of converted models, the cache."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import openvino_genai
import pytest

from modelswap.engines.openvino_server import genai, gguf, store
from modelswap.engines.openvino_server.pipeline import CannotLoad


def text(value: str) -> bytes:
    """Return a GGUF string."""
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def tiny_gguf(context: int | None = 2048) -> bytes:
    """Return a whole GGUF file with one Q4_0 tensor of 64 elements."""
    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("general.alignment") + struct.pack("<II", 4, 64),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
        text("tokenizer.ggml.scores") + struct.pack("<IIQff", 9, 6, 2, 0.5, 1.5),
    ]
    if context is not None:
        pairs.append(text("llama.context_length") + struct.pack("<II", 4, context))
    tensor = text("blk.0.weight") + struct.pack("<IQQIQ", 2, 32, 2, 2, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(pairs)) + b"".join(pairs) + tensor
    return head + bytes(-len(head) % 64) + bytes(36)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return the path of a whole small GGUF file."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_gguf())
    return path


def test_gguf_facts(model: Path) -> None:
    """Architecture and context length are read past arrays of strings and numbers."""
    assert gguf.read(model) == gguf.Facts("llama", 2048)
    model.write_bytes(tiny_gguf(None))
    assert gguf.read(model).context is None


def test_a_gguf_that_ends_early_is_noticed(model: Path) -> None:
    """Wherever a download broke off, the reason is a clear one and never a crash."""
    whole = model.read_bytes()
    for length in range(4, len(whole)):
        model.write_bytes(whole[:length])
        with pytest.raises(CannotLoad, match="fetch it again"):
            gguf.read(model)


def test_no_gguf_at_all(model: Path) -> None:
    """Another kind of file, and an empty one, are told apart from a broken one."""
    for content in (b"", b"GG", b"PK\x03\x04 a zip"):
        model.write_bytes(content)
        with pytest.raises(CannotLoad, match="not a GGUF file"):
            gguf.read(model)


@pytest.mark.parametrize("kind", [13, 255])
def test_a_gguf_with_unknown_types(model: Path, kind: int) -> None:
    """A value of a type that GGUF doesn't have means that the file is damaged."""
    model.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("key") + struct.pack("<IQ", kind, 0))
    with pytest.raises(CannotLoad, match="damaged"):
        gguf.read(model)


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """What fails while it is filled leaves nothing; what is whole has its facts; what lost a file counts as absent."""
    folder = store.Folder(tmp_path / "parent" / "it")

    def break_off() -> None:
        with folder.fill({}) as unfinished:
            (unfinished / "file").write_text("half")
            raise ValueError("broke")

    with pytest.raises(ValueError, match="broke"):
        break_off()
    assert folder.facts() is None
    assert [entry.name for entry in (tmp_path / "parent").iterdir()] == [".lock"]
    with folder.fill({"n": 1}) as unfinished:
        (unfinished / "file").write_text("whole")
    assert folder.facts() == {"n": 1}
    (folder.path / "file").write_text("cut")
    assert folder.facts() is None
    with folder.fill({"n": 2}) as unfinished:
        (unfinished / "file").write_text("again")
    assert folder.facts() == {"n": 2}
    (folder.path / "modelswap.json").write_text("{")
    assert folder.facts() is None


def test_only_one_fills(tmp_path: Path) -> None:
    """While one process fills a folder another is turned away, and what the first has put in place stays."""
    folder = store.Folder(tmp_path / "it")

    def fill() -> None:
        with folder.fill({"n": 2}):
            pass

    with folder.fill({"n": 1}), pytest.raises(BlockingIOError):
        fill()
    fill()
    assert folder.facts() == {"n": 1}


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """An unfinished folder whose process has gone is removed by the next one."""
    abandoned = tmp_path / ".unfinished-old"
    abandoned.mkdir()
    with store.Folder(tmp_path / "it").fill({}) as unfinished:
        assert not abandoned.exists()
        assert unfinished.exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"it", ".lock"}


def test_identity_follows_the_file(model: Path, tmp_path: Path) -> None:
    """A link has its file's identity; a changed file or another version of the library has another."""
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    first = store.identity(model, "1")
    assert store.identity(link, "1") == first
    assert store.identity(model, "2") != first
    os.utime(model, (1, 1))
    assert store.identity(model, "1") != first


class Library:
    """Stands in for OpenVINO's pipeline: notes how models are opened, writes what the real one writes."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, dict[str, Any]]] = []
        self.failing: str | None = None

    def __call__(self, path: Path, device: str, **properties: Any) -> Library:
        """Open a model."""
        self.opened.append((path.name, properties))
        if self.failing and self.failing in properties:
            raise RuntimeError(f"no {self.failing}")
        if properties.get("enable_save_ov_model"):
            (path.parent / "openvino_model.xml").write_text("<net/>")
        if (cache := properties.get("CACHE_DIR")) and not list(Path(cache).glob("*.blob")):
            (Path(cache) / "1.blob").write_text("compiled")
        return self

    def get_tokenizer(self) -> None:
        """Return none, as nothing is generated here."""

    def ways(self) -> list[str]:
        """Return how models were opened since the last call: direct, converting, compiling or compiled."""
        names = []
        for _, properties in self.opened:
            way = "converting" if "enable_save_ov_model" in properties else "direct"
            names.append("compiled" if "CACHE_DIR" in properties else way)
        self.opened.clear()
        return names


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Put the stand-in in the library's place."""
    library = Library()
    monkeypatch.setattr("openvino_genai.LLMPipeline", library)
    return library


@pytest.fixture
def options(tmp_path: Path) -> genai.Options:
    """Return options with a cache."""
    return genai.Options(threads=2, cache=tmp_path / "cache")


def blobs(options: genai.Options) -> int:
    """Return how many compiled forms are kept."""
    assert options.cache
    return len(list(options.cache.glob("*/compiled-*/*.blob")))


def test_converted_once_compiled_once(model: Path, library: Library, options: genai.Options) -> None:
    """The first start converts, the second compiles, and all later ones load what was kept."""
    genai.load(model, options)
    assert library.opened[0][1]["INFERENCE_NUM_THREADS"] == 2
    assert library.ways() == ["converting"]
    assert blobs(options) == 0
    genai.load(model, options)
    assert library.opened[0][0] == "model"
    assert library.ways() == ["compiled"]
    assert blobs(options) == 1
    genai.load(model, options)
    assert library.ways() == ["compiled"]
    assert blobs(options) == 1
    genai.load(model, genai.Options(device="GPU", cache=options.cache))
    assert blobs(options) == 2
    assert not list(model.parent.glob("cache/**/source.gguf"))


def test_a_new_file_replaces_what_was_made_of_the_old(model: Path, library: Library, options: genai.Options) -> None:
    """When the model's file changes it is converted anew, and the cache doesn't grow."""
    genai.load(model, options)
    os.utime(model, (1, 1))
    genai.load(model, options)
    assert library.ways() == ["converting", "converting"]
    assert options.cache
    assert len(list(options.cache.iterdir())) == 1


def test_without_a_cache(model: Path, library: Library) -> None:
    """Without a cache the file is opened as it is."""
    genai.load(model, genai.Options())
    assert library.ways() == ["direct"]


def test_a_cache_that_can_not_be_used(
    model: Path, library: Library, options: genai.Options, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache that fails is said and done without, and a compiled form that doesn't load is thrown away."""
    library.failing = "enable_save_ov_model"
    genai.load(model, options)
    assert library.ways() == ["converting", "direct"]
    assert "not using the cache" in capsys.readouterr().err
    library.failing = None
    genai.load(model, options)
    genai.load(model, options)
    assert blobs(options) == 1
    library.failing = "CACHE_DIR"
    genai.load(model, options)
    assert library.ways() == ["converting", "compiled", "compiled", "direct"]
    assert blobs(options) == 0
    assert options.cache
    genai.load(model, genai.Options(cache=model / "not-a-folder"))
    assert library.ways() == ["direct"]


def test_a_cache_that_is_being_filled(
    model: Path, library: Library, options: genai.Options, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start beside one that fills the cache does without it."""
    assert options.cache
    folder = store.Folder(options.cache / store.identity(model, openvino_genai.__version__) / "model")
    with folder.fill({}):
        genai.load(model, options)
    assert library.ways() == ["direct"]
    assert "another process is filling" in capsys.readouterr().err


def test_an_ir_folder(tmp_path: Path, library: Library, options: genai.Options) -> None:
    """An IR folder needs no conversion; its context length is read from the config beside it, if there is one."""
    folder = tmp_path / "ir"
    folder.mkdir()
    with pytest.raises(CannotLoad, match=r"openvino_model\.xml"):
        genai.load(folder, options)
    (folder / "openvino_model.xml").write_text("<net/>")
    for content, context in ((None, None), ("{", None), ("[]", None), ('{"max_position_embeddings": 512}', 512)):
        if content is not None:
            (folder / "config.json").write_text(content)
        assert genai.load(folder, options).context == context
    assert library.ways() == ["compiled"] * 4
    assert blobs(options) == 1


def test_what_can_not_be_loaded(model: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way in which a model can't be loaded is one kind of error with its reason."""
    with pytest.raises(CannotLoad, match="no such file"):
        genai.load(model.with_name("none.gguf"), genai.Options())
    library.failing = "ATTENTION_BACKEND"
    with pytest.raises(CannotLoad, match="no ATTENTION_BACKEND"):
        genai.load(model, genai.Options())

    def no_memory(*args: Any, **properties: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("openvino_genai.LLMPipeline", no_memory)
    with pytest.raises(CannotLoad, match="out of host memory"):
        genai.load(model, genai.Options())
