"""The command ``modelswap``. Each command imports what it needs when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from modelswap.cli.failure import ExitCode, Failure

_TRACEBACK = "MODELSWAP_TRACEBACK"
_EXIT_CODES = (
    "[bold]Exit codes[/bold]  0 done · 1 failed · 2 wrong usage or config file · 3 the orchestrator can't be reached · "
    "4 the model could not be made ready · 130 interrupted"
)


def _epilog(*examples: str) -> str:
    return "\n\n".join(["[bold]Examples[/bold]", "\n".join(f"  {example}" for example in examples), _EXIT_CODES])


app = typer.Typer(
    name="modelswap",
    help="One GPU, every model: one OpenAI-compatible address in front of many LLM servers, swapped on demand.",
    epilog=_epilog("modelswap demo", "modelswap check && modelswap up", "modelswap status", "modelswap swap mistral"),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[
    Path,
    typer.Option("--config", "-c", metavar="FILE", envvar="MODELSWAP_CONFIG", help="The config file."),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        envvar="MODELSWAP_URL",
        help="The orchestrator's address; default: the config file's, or http://127.0.0.1:8888 without one.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A configured model, or one of its aliases.")]
CONFIG_FILE = Path("modelswap.yaml")


@app.command(epilog=_epilog("modelswap up", "modelswap up --config /etc/modelswap.yaml"), rich_help_panel="Run")
def up(config: ConfigFile = CONFIG_FILE) -> None:
    """Run everything: the orchestrator and the gateway's workers; one that dies is started again.

    Ctrl-C or SIGTERM lets running requests finish and stops everything; a second one stops at once. SIGHUP reads the
    config file again: models whose definition did not change keep running.
    """
    from modelswap.cli.up import up as command

    _end(command(config))


@app.command(epilog=_epilog("modelswap demo", "modelswap demo --once"), rich_help_panel="Run")
def demo(
    once: Annotated[bool, typer.Option("--once", help="End after the requests, instead of staying up.")] = False,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="The gateway's port.")] = 8080,
    orchestrator_port: Annotated[
        int, typer.Option("--orchestrator-port", min=1, max=65535, help="The orchestrator's port.")
    ] = 8888,
) -> None:
    """See it work: real SmolLM2 weights on the embedded engine, chat requests that force swaps, a table of them.

    Downloads about 90 MB of weights the first time. Needs no GPU and no config file; ports that are taken are replaced
    by free ones.
    """
    from modelswap.cli.demo import demo as command

    _end(command(once=once, port=port, orchestrator_port=orchestrator_port))


@app.command(epilog=_epilog("modelswap orchestrator --config modelswap.yaml"), rich_help_panel="Run")
def orchestrator(config: ConfigFile = CONFIG_FILE) -> None:
    """Run the orchestrator alone: decides, swaps, serves status and metrics (port 8888).

    SIGTERM ends it and leaves the engines running; the next one takes them over.
    """
    from modelswap.cli.services import orchestrator as command

    command(config)


@app.command(epilog=_epilog("modelswap gateway --worker 0"), rich_help_panel="Run")
def gateway(
    config: ConfigFile = CONFIG_FILE,
    worker: Annotated[int, typer.Option("--worker", min=0, help="This worker's number.")] = 0,
    url: Url = None,
) -> None:
    """Run one gateway worker alone: the OpenAI-compatible address (port 8080).

    It shows the orchestrator the token in the state folder, or the one in the variable MODELSWAP_TOKEN.
    """
    from modelswap.cli.services import gateway as command

    _end(ExitCode(command(config, worker, url)))


@app.command(epilog=_epilog("modelswap check", "modelswap check -c other.yaml"), rich_help_panel="Look")
def check(config: ConfigFile = CONFIG_FILE) -> None:
    """Check the config file: every error with its line, a summary, and warnings about what looks wrong."""
    from modelswap.cli.check import check as command

    command(config)


@app.command(
    epilog=_epilog("modelswap doctor", "modelswap doctor --json | jq .findings", "modelswap doctor --deep"),
    rich_help_panel="Look",
)
def doctor(
    config: ConfigFile = CONFIG_FILE,
    as_json: AsJson = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also start a container of each image, to see its GPUs.")
    ] = False,
) -> None:
    """Look at all that models need: Docker, GPU, memory, ports, images, weights, disks, permissions.

    Each finding comes with its remedy. Changes nothing. Ends with 1 if something will not work.
    """
    from modelswap.cli.doctor.command import doctor as command

    _end(command(config, default=CONFIG_FILE, as_json=as_json, deep=deep))


@app.command(epilog=_epilog("modelswap status", "modelswap status --json | jq .current_model"), rich_help_panel="Look")
def status(config: ConfigFile = CONFIG_FILE, url: Url = None, as_json: AsJson = False) -> None:
    """Show what runs, who waits, the swap under way and the last ones."""
    from modelswap.cli.look import status as command

    command(_url(config, url), as_json=as_json)


@app.command(epilog=_epilog("modelswap models", "modelswap models --json"), rich_help_panel="Look")
def models(config: ConfigFile = CONFIG_FILE, url: Url = None, as_json: AsJson = False) -> None:
    """List the configured models, their states, and what was measured of them."""
    from modelswap.cli.look import models as command

    command(_url(config, url), as_json=as_json)


@app.command(epilog=_epilog("modelswap logs mistral -n 50", "modelswap logs mistral --follow"), rich_help_panel="Look")
def logs(
    model: ModelName,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, max=10_000, help="How many of the last lines.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")] = False,
    config: ConfigFile = CONFIG_FILE,
    url: Url = None,
) -> None:
    """Print the last lines of a model's engine log."""
    from modelswap.cli.look import logs as command

    command(_url(config, url), model, lines, follow=follow)


@app.command(epilog=_epilog("modelswap swap llava"), rich_help_panel="Act")
def swap(model: ModelName, config: ConfigFile = CONFIG_FILE, url: Url = None) -> None:
    """Make a model the current one, and return when it is ready.

    Running requests of the model before it finish first. Ctrl-C takes the wish back, unless its start has begun.
    """
    from modelswap.cli.act import swap as command

    command(_url(config, url), model)


@app.command(epilog=_epilog("modelswap unload", "modelswap unload mistral"), rich_help_panel="Act")
def unload(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Default: every model.")] = None,
    config: ConfigFile = CONFIG_FILE,
    url: Url = None,
) -> None:
    """Stop a model's engine after its running requests, and free the device."""
    from modelswap.cli.act import unload as command

    command(_url(config, url), model)


@app.command(epilog=_epilog("modelswap calibrate", "modelswap calibrate mistral"), rich_help_panel="Act")
def calibrate(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Default: every model.")] = None,
    config: ConfigFile = CONFIG_FILE,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Measure how fast a model starts, sleeps and wakes, and whether it answers as before.

    Swaps measure this by themselves as they happen. Calibrating begins anew, also for what was switched off because it
    went wrong. It takes several starts, during which other models wait; in the end, what was loaded before comes back.
    """
    from modelswap.cli.act import calibrate as command

    command(_url(config, url), model, as_json=as_json)


@app.command(epilog=_epilog("modelswap pin mistral"), rich_help_panel="Act")
def pin(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Default: what is resident.")] = None,
    config: ConfigFile = CONFIG_FILE,
    url: Url = None,
) -> None:
    """Keep a model once it is there: requests for others on its device are refused until it is released."""
    from modelswap.cli.act import pin as command

    command(_url(config, url), model, pinned=True)


@app.command(epilog=_epilog("modelswap unpin", "modelswap unpin mistral"), rich_help_panel="Act")
def unpin(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Default: every model.")] = None,
    config: ConfigFile = CONFIG_FILE,
    url: Url = None,
) -> None:
    """Leave a pinned model for others again."""
    from modelswap.cli.act import pin as command

    command(_url(config, url), model, pinned=False)


@app.command(
    epilog=_epilog("modelswap pull", "modelswap pull mistral coder", "modelswap pull --newer mistral"),
    rich_help_panel="Act",
)
def pull(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="Models or aliases. Default: every model.")
    ] = None,
    newer: Annotated[
        bool, typer.Option("--newer", help="Also ask whether there is a newer image or revision of what is here.")
    ] = False,
    config: ConfigFile = CONFIG_FILE,
) -> None:
    """Download the images and weights of models ahead of time, with progress bars.

    Weights go to the Hugging Face cache that engines load from; HF_TOKEN, HF_HOME and HF_ENDPOINT count, and a model's
    own env over them. What is here already is left alone. Ctrl-C keeps what came, and the next time goes on there.
    """
    from modelswap.cli.pull import pull as command

    _end(command(config, models or [], newer=newer))


importer = typer.Typer(
    help="Write a config file from another program's: compose files, llama-swap.",
    epilog=_epilog("modelswap import compose compose.yaml", "modelswap import llama-swap config.yaml"),
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(importer, name="import", rich_help_panel="Act")
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="What to write; - prints it.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]


@importer.command(
    "compose",
    epilog=_epilog(
        "modelswap import compose compose.yaml",
        "modelswap import compose compose.yaml compose.gpu.yaml --managed -o modelswap.yaml",
        "modelswap import compose -o - | less",
    ),
)
def import_compose(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]...", help="Compose files, the later over the earlier. Default: the one here."),
    ] = None,
    more: Annotated[list[Path] | None, typer.Option("--file", "-f", metavar="FILE", help="The same as FILE.")] = None,
    managed: Annotated[
        bool,
        typer.Option(
            "--managed/--adopted",
            help="Let modelswap make the containers from their images, or start and stop those that compose makes.",
        ),
    ] = False,
    output: Output = CONFIG_FILE,
    force: Force = False,
) -> None:
    """Write a config for the LLM services in compose files: vLLM, llama.cpp, SGLang, TGI, Ollama.

    What can't be carried over is listed, and stands at the end of the new file. Secrets are not copied.
    """
    from modelswap.cli.importing import compose as command

    command([*(files or []), *(more or [])], output, managed=managed, force=force)


@importer.command("llama-swap", epilog=_epilog("modelswap import llama-swap config.yaml"))
def import_llama_swap(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="llama-swap's config.yaml.")],
    output: Output = CONFIG_FILE,
    force: Force = False,
) -> None:
    """Write a config for the models in llama-swap's config file.

    What can't be carried over is listed, and stands at the end of the new file. Secrets are not copied.
    """
    from modelswap.cli.importing import llama_swap as command

    command(file, output, force=force)


@app.command(epilog=_epilog("modelswap version"), rich_help_panel="Look")
def version() -> None:
    """Print the version."""
    import modelswap

    typer.echo(f"modelswap {modelswap.__version__}")


def _url(path: Path, url: str | None) -> str:
    from modelswap.cli.settings import orchestrator_url

    return orchestrator_url(path, url, default=CONFIG_FILE)


def _end(code: ExitCode) -> None:
    if code != ExitCode.OK:
        raise typer.Exit(code)


def _tell(failure: Failure) -> None:
    from rich.console import Console
    from rich.text import Text

    remedy = f"\n  → {failure.remedy}" if failure.remedy else ""
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(failure), (remedy, "")), soft_wrap=True)


def run(argv: list[str] | None = None) -> Any:
    """Run the command line in ``argv`` (default: the process's own) and end the process with its exit code."""
    try:
        app(argv)
    except Failure as failure:
        _tell(failure)
        sys.exit(failure.code)
    except Exception as error:
        # A bug of ours: one line for the user, and the traceback for who wants to report it. A service logs it always.
        if _TRACEBACK in os.environ or not {"orchestrator", "gateway"}.isdisjoint((argv or sys.argv)[1:2]):
            raise
        _tell(Failure(f"{type(error).__name__}: {error}", f"this is a bug in modelswap; {_TRACEBACK}=1 shows where"))
        sys.exit(ExitCode.FAILED)


if __name__ == "__main__":
    run()
