"""llama-swap's config: what its models become, and that nothing of it is lost in silence."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from modelswap.importing import report
from modelswap.importing.llamaswap.convert import convert
from modelswap.importing.result import CannotImport, Imported, Kind
from tests.importing.reading import noted, plain, text
from tests.importing.test_compose_files import leaves, seen, without


def swap(text_: str) -> Imported:
    """Import llama-swap's config."""
    return convert(text_, "config.yaml")


def model(lines: str, rest: str = "") -> tuple[dict[str, Any], Imported]:
    """Import a file with one model, ``m``; return it, and all. What comes out is checked to load."""
    body = "".join(f"    {line}\n" for line in lines.strip("\n").splitlines())
    imported = swap(f"{rest}\nmodels:\n  m:\n{body}")
    report.verify(report.text(imported, "x"), imported, {}, "x")
    (found,) = imported.config["models"].values()
    return found, imported


def test_golden() -> None:
    """A file with everything becomes exactly the config that lies beside it, and that loads."""
    imported = swap(text("llama-swap.yaml"))
    assert imported.config == plain("llama-swap.expected.yaml")
    config = report.verify(report.text(imported, "x"), imported, {"HOME": "/home/u"}, "x")
    assert config.models["gpt-oss-120b"].model == "/home/u/models/gpt-oss-120B.gguf"
    tts = "python3 -m tts_server --host {host} --port {port} --voice af"
    assert config.models["tts"].command == tts.split()


@pytest.mark.long
def test_every_key_counts() -> None:
    """Taking any key out changes the config or the notes: none is read for nothing, none overlooked."""
    whole = yaml.safe_load(yaml.safe_dump(plain("llama-swap.yaml")))
    full = seen(swap(yaml.safe_dump(whole, sort_keys=False)))
    wholes = {"metadata", "setParamsByID", "peers", "hooks"}
    silent = set()
    for path in leaves(whole, ()):
        if not wholes.isdisjoint(path[:-1]):
            continue
        try:
            result = seen(swap(yaml.safe_dump(without(whole, path), sort_keys=False)))
        except CannotImport:
            continue
        if result == full:
            silent.add(".".join(path))
    # Both are what modelswap does anyway: a container is stopped, and one member alone has nobody to run with.
    assert silent == {"models.docker-llama.cmdStop", "groups.forever.swap", "models.docker-llama.proxy"}


def test_no_secret_is_copied() -> None:
    """Keys and tokens of the input stand nowhere in the outcome."""
    imported = swap(text("llama-swap.yaml"))
    everything = report.text(imported, "x") + repr(imported)
    assert not [each for each in ("sk-hunter2", "secret1234", "hf_abcdefghijkl") if each in everything]
    assert noted(imported, Kind.ACTION, "models.vl.cmd", "VLLM_API_KEY")
    assert noted(imported, Kind.ACTION, "apiKeys", "gateway.host")


def test_macros() -> None:
    """A model's own go before the file's, and later ones may hold earlier ones, the name, the environment."""
    found, _ = model(
        "macros: {size: 2}\ncmd: ${base} --size ${size} --id ${MODEL_ID}",
        'macros: {root: "${env.HOME}/x", size: 1, base: "llama-server --port ${PORT} -m ${root}/m.gguf"}',
    )
    assert found["model"] == "${HOME}/x/m.gguf"
    assert found["args"] == ["--size", "2", "--id", "m"]


def test_an_unknown_macro_is_told() -> None:
    """llama-swap would refuse it; here it stays as text, with a note."""
    found, imported = model('cmd: llama-server --port ${PORT} -m /m.gguf --x "${nope}"')
    assert found["args"] == ["--x", "$${nope}"]
    assert noted(imported, Kind.ACTION, "models.m", "${nope}")


def test_commands_may_have_comments_quotes_and_line_ends() -> None:
    """A command line is read as llama-swap reads it."""
    found, _ = model(
        "cmd: |\n  # the server\n  llama-server \\\n    --port ${PORT}\n    # weights\n"
        "    -m '/models/a b.gguf' --chat-template \"it's\""
    )
    assert (found["model"], found["args"]) == ("/models/a b.gguf", ["--chat-template", "it's"])


def test_a_comment_may_name_a_macro_of_several_lines() -> None:
    """Comments are gone before macros are filled in, so that no line of one is left; a macro may have comments, too."""
    found, _ = model(
        "cmd: |\n  # ${server} is defined above\n  ${server}\n  -m /m.gguf",
        "macros:\n  server: |\n    # the latest\n    /opt/llama-server\n    --port ${PORT}\n",
    )
    assert (found["program"], found.get("args")) == (["/opt/llama-server"], None)


def test_notes_on_a_container_name_keys_that_are_there() -> None:
    """What is said of its command line is said of cmd."""
    _, imported = model("cmd: docker run -p ${PORT}:8000 vllm/vllm-openai --model org/m --port 8000 --api-key k")
    assert {note.key for note in imported.notes} == {"models.m.cmd", "models.m"}


def test_no_secret_is_copied_in_a_script() -> None:
    """What a shell is told holds none either."""
    found, imported = model("cmd: bash -c 'serve --port ${PORT} --api-key plain-key'\nenv: ['ARGS=--token plain-key']")
    assert found["command"] == ["bash", "-c", "serve --port {port} --api-key ${API_KEY}"]
    assert found["env"] == {"ARGS": "--token ${API_KEY}"}
    assert noted(imported, Kind.ACTION, "models.m.cmd", "API_KEY")


def test_windows_paths_keep_their_backslashes() -> None:
    """On Windows a backslash is part of a path."""
    found, _ = model(r"cmd: C:\llama\llama-server.exe -m D:\models\m.gguf --port ${PORT}")
    assert found["program"] == [r"C:\llama\llama-server.exe"]
    assert found["model"] == r"D:\models\m.gguf"


@pytest.mark.parametrize(
    ("lines", "command"),
    [
        ("cmd: tabby --port ${PORT}", ["tabby", "--port", "{port}"]),
        ("cmd: tabby --port=9000\nproxy: http://127.0.0.1:9000", ["tabby", "--port={port}"]),
        ("cmd: tabby -l 127.0.0.1:9000\nproxy: http://localhost:9000/", ["tabby", "-l", "127.0.0.1:{port}"]),
        ("cmd: tabby --port 90001 9000\nproxy: http://localhost:9000", ["tabby", "--port", "90001", "{port}"]),
        ("cmd: tabby --host=0.0.0.0 -p ${PORT}", ["tabby", "--host={host}", "-p", "{port}"]),
        ("cmd: env A=b C=d tabby ${PORT}", ["tabby", "{port}"]),
        ("cmd: sh -c 'llama-server -m /m.gguf --port ${PORT}'", ["sh", "-c", "llama-server -m /m.gguf --port {port}"]),
        (
            "cmd: llama-server --models-dir /m -p ${PORT}",
            ["llama-server", "--models-dir", "/m", "-p", "{port}"],
        ),
    ],
)
def test_any_other_command_is_told_its_port(lines: str, command: list[str]) -> None:
    """``{port}`` goes where llama-swap's port stood, picked or written."""
    found, imported = model(lines)
    assert found["engine"] == "custom"
    assert found["command"] == command
    assert not any("put {port}" in note.text for note in imported.notes)


def test_a_command_without_a_port_is_told() -> None:
    """Nobody could guess where it listens."""
    _, imported = model("cmd: start-it\nproxy: http://127.0.0.1:9000")
    assert noted(imported, Kind.ACTION, "models.m.cmd", "put {port} into its command")


def test_a_port_in_the_environment_is_found() -> None:
    """Some servers are told their port by a variable."""
    found, imported = model('cmd: serve\nenv: ["PORT=${PORT}"]')
    assert found["env"] == {"PORT": "{port}"}
    assert not any("put {port}" in note.text for note in imported.notes)


@pytest.mark.parametrize(
    ("cmd", "expected"),
    [
        ("docker start -a llm", {"engine": "custom", "container": "llm"}),
        ("docker compose up llm", {"engine": "custom", "compose_service": "llm"}),
        (
            "docker run --rm -p ${PORT}:8000 vllm/vllm-openai --model org/x",
            {"engine": "vllm", "model": "org/x"},
        ),
        ("docker run -p ${PORT}:5000 some/server --flag", {"engine": "custom", "command": ["--flag"], "port": 5000}),
    ],
)
def test_containers(cmd: str, expected: dict[str, Any]) -> None:
    """A container that exists is adopted, one that is made is managed."""
    found, _ = model(f"cmd: {cmd}")
    assert {key: found.get(key) for key in expected} == expected


def test_podman_and_passed_variables_are_told() -> None:
    """The socket to use is named; a variable of the command itself reaches the container only if it is passed on."""
    found, imported = model('cmd: podman run -e A -p 1:2 some/server\nenv: ["A=1", "B=2"]')
    assert found["env"] == {"A": "1"}
    assert noted(imported, Kind.CHANGED, "models.m.cmd", "docker.host")
    assert noted(imported, Kind.LOST, "models.m.env", "B:")


def test_a_model_elsewhere_cannot_be_carried_over() -> None:
    """It is named as lost; alone in its file, the import ends with why."""
    text_ = "models: {far: {cmd: ssh x, proxy: 'http://10.0.0.9:8000'}, near: {cmd: 'serve ${PORT}'}}"
    imported = swap(text_)
    assert list(imported.config["models"]) == ["near"]
    assert noted(imported, Kind.LOST, "models.far", "10.0.0.9")
    with pytest.raises(CannotImport, match=r"none of its models can be carried over.*10\.0\.0\.9"):
        swap("models: {far: {cmd: ssh x, proxy: 'http://10.0.0.9:8000'}}")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("checkEndpoint: none", {"ready": "/v1/models"}),
        ("checkEndpoint: /ok", {"ready": "/ok"}),
        ("checkEndpoint: /health", {}),
        ("useModelName: their-name", {"model": "their-name"}),
        ("concurrencyLimit: 3", {"concurrency": 3}),
        ("concurrencyLimit: 0", {}),
        ("unloadTimeout: 30", {"stop_grace": 30}),
        ("env: [CUDA_VISIBLE_DEVICES=]", {"device": "none", "env": {"CUDA_VISIBLE_DEVICES": ""}}),
        ("aliases: [a, {id: b, name: B}, m]", {"aliases": ["a", "b"]}),
    ],
)
def test_settings_of_a_model(lines: str, expected: dict[str, Any]) -> None:
    """What has a counterpart here is carried over."""
    found, _ = model(f"cmd: serve ${{PORT}}\n{lines}")
    assert found == {"engine": "custom", "command": ["serve", "{port}"], **expected}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("sglang serve --model-path org/m --port ${PORT} --tp 2", {"args": ["--tp", "2"]}),
        (
            "/v/bin/python -m sglang.launch_server --model-path /w/m --host 0.0.0.0 --port ${PORT}",
            {"model": "/w/m", "program": ["/v/bin/python", "-m", "sglang.launch_server"]},
        ),
        (
            "docker run --gpus all -p ${PORT}:30000 lmsysorg/sglang sglang serve --model-path org/m --port 30000",
            {"image": "lmsysorg/sglang", "entrypoint": ["sglang", "serve"], "gpus": "all"},
        ),
    ],
)
def test_sglang_is_an_engine_of_ours(command: str, expected: dict[str, Any]) -> None:
    """It is carried over like vLLM: model and options, without what modelswap sets itself."""
    found, _ = model(f"cmd: {command}")
    assert found == {"engine": "sglang", "model": "org/m", **expected}


@pytest.mark.parametrize(
    ("own", "common", "expected"),
    [
        ("", "", None),
        ("ttl: 60", "", 60),
        ("", "globalTTL: 300", 300),
        ("ttl: 60", "globalTTL: 300", 60),
        ("ttl: -1", "globalTTL: 300", 300),
        ("ttl: 0", "globalTTL: 300", None),
        ("ttl: -1", "globalTTL: 0", None),
    ],
)
def test_unloading_when_idle(own: str, common: str, expected: int | None) -> None:
    """A model's own ttl goes before the file's; 0 is never, -1 leaves it to the file."""
    found, imported = model(f"cmd: serve ${{PORT}}\n{own}", common)
    assert found.get("ttl") == expected
    assert imported.notes == []


def test_what_is_loaded_at_start() -> None:
    """Models to be preloaded are so here, by name or alias; that only one of those with a GPU can be is told."""
    imported = swap(
        "models: {a: {cmd: 'x ${PORT}'}, b: {cmd: 'y ${PORT}', aliases: [bb]},"
        " c: {cmd: 'llama-server -m /m -ngl 0 --port ${PORT}'}}\n"
        "hooks: {on_startup: {preload: [c, bb, a, gone]}}"
    )
    assert [each.get("preload") for each in imported.config["models"].values()] == [True, True, True]
    assert noted(imported, Kind.CHANGED, "hooks.on_startup.preload", "of a, b the first")
    assert noted(imported, Kind.LOST, "hooks.on_startup.preload", "gone")


def test_one_model_loaded_at_start_needs_no_note() -> None:
    """It is just what modelswap does."""
    found, imported = model("cmd: serve ${PORT}", "hooks: {on_startup: {preload: [m]}}")
    assert found["preload"] is True
    assert imported.notes == []


@pytest.mark.parametrize(
    ("stop", "command"),
    [
        ("kill -9 ${PID}", None),
        ("docker stop -t 5 ${MODEL_ID}", None),
        ("|\n    # softly\n    /opt/stop.sh ${MODEL_ID} 2", ["/opt/stop.sh", "m", "2"]),
        ("pkill -f 'my serve'", ["pkill", "-f", "my serve"]),
    ],
)
def test_a_command_that_stops(stop: str, command: list[str] | None) -> None:
    """What modelswap does by itself is left out; anything else runs before the engine is stopped."""
    found, imported = model(f"cmd: serve ${{PORT}}\ncmdStop: {stop}")
    assert found.get("hooks") == (None if command is None else {"before_unload": [{"command": command}]})
    assert noted(imported, Kind.CHANGED, "models.m.cmdStop", "before_unload") is (command is not None)


@pytest.mark.parametrize("stop", ["curl -X POST http://localhost:${PORT}/stop", "/opt/stop.sh ${PID}"])
def test_a_command_that_stops_by_port_or_pid_is_lost(stop: str) -> None:
    """Hooks are told neither."""
    found, imported = model(f"cmd: serve ${{PORT}}\ncmdStop: {stop}")
    assert "hooks" not in found
    assert noted(imported, Kind.LOST, "models.m.cmdStop", "neither PID nor port")


def test_the_shortest_start_is_llama_swaps() -> None:
    """It raises a time limit below 15 s, and so do we."""
    found, _ = model("cmd: serve ${PORT}", "healthCheckTimeout: 5")
    assert found["start_timeout"] == 15


@pytest.mark.parametrize("where", ["groups: {g: %s}", "routing: {router: {use: group, settings: {groups: {g: %s}}}}"])
def test_groups(where: str) -> None:
    """What ran together there is told that it takes turns here; models without a GPU needn't be."""
    group = "{swap: false, exclusive: false, persistent: true, members: [a, b, c, gone]}"
    imported = swap(
        "models: {a: {cmd: 'x ${PORT}'}, b: {cmd: 'y ${PORT}'},"
        " c: {cmd: 'llama-server -m /m -ngl 0 --port ${PORT}'}}\n" + where % group
    )
    at = "groups.g" if where.startswith("groups") else "routing.router.settings.groups.g"
    for key in ("swap", "exclusive", "persistent"):
        assert noted(imported, Kind.CHANGED, f"{at}.{key}", "a, b ")
    assert noted(imported, Kind.LOST, f"{at}.members", "gone")
    assert not any("unknown" in note.text or "known here" in note.text for note in imported.notes)


def test_a_plain_group_is_what_we_do_anyway() -> None:
    """One model at a time needs no note."""
    imported = swap("models: {a: {cmd: 'x ${PORT}'}, b: {cmd: 'y ${PORT}'}}\ngroups: {g: {members: [a, b]}}")
    assert imported.notes == []


def test_a_matrix_is_told() -> None:
    """Combinations of models become turns."""
    imported = swap("models: {a: {cmd: 'x ${PORT}'}}\nmatrix: {vars: {a: a}, sets: {s: a}}")
    assert noted(imported, Kind.CHANGED, "matrix", "take turns")


def test_priorities_by_name_and_alias() -> None:
    """They are carried over within our limits."""
    imported = swap(
        "models: {a: {cmd: 'x ${PORT}', aliases: [aa]}, b: {cmd: 'y ${PORT}'}}\n"
        "routing: {scheduler: {settings: {fifo: {priority: {aa: 7, b: -500, gone: 1}}}}}"
    )
    assert [each["priority"] for each in imported.config["models"].values()] == [7, -100]
    assert noted(imported, Kind.LOST, "routing.scheduler.settings.fifo.priority.gone")


def test_one_gpu_for_all_is_the_device() -> None:
    """Where every model is on one GPU, modelswap watches that one."""
    imported = swap(
        "models:\n  a: {cmd: 'x ${PORT}', env: [CUDA_VISIBLE_DEVICES=1]}\n"
        "  b: {cmd: 'y ${PORT}', env: [CUDA_VISIBLE_DEVICES=1]}\n"
    )
    assert imported.config["device"] == {"index": 1}


def test_names_that_requests_cannot_use_are_mended() -> None:
    """A name with a space gets another, which groups know, too."""
    imported = swap("models: {'my model': {cmd: 'x ${PORT}'}}\ngroups: {g: {persistent: true, members: ['my model']}}")
    assert list(imported.config["models"]) == ["my-model"]
    assert noted(imported, Kind.CHANGED, "groups.g.persistent", "my-model")


def test_what_people_wrote_is_kept_as_comments() -> None:
    """Name and description stand above the model."""
    _, imported = model("cmd: serve ${PORT}\nname: Big ${MODEL_ID}\ndescription: |\n  thinks\n  a lot")
    assert "  # Big m: thinks\n  # a lot\n  m:\n" in report.text(imported, "x")


@pytest.mark.parametrize(
    ("text_", "said", "remedy"),
    [
        ("services: {a: {image: b}}", "this is a compose file", "modelswap import compose config.yaml"),
        ("models: {a: {engine: vllm, model: b}}", "modelswap's already", "modelswap check"),
        ("models: {}", "has no models", "llama-swap"),
        ("macros: {a: b}", "has no models", "llama-swap"),
        ("models: {a: {}}", "models.a.cmd: is missing", "is it its config"),
        ("models: {a: {cmd: '# nothing'}}", "says no command", "mend"),
        ('models: {a: {cmd: "x \'y"}}', "models.a.cmd: can't be split", "quotes"),
        ("models: {a: b}", "models.a: wants a mapping", "mend"),
        ("models: {a: {cmd: x, ttl: 1, concurrencyLimit: many}}", "concurrencyLimit: wants a whole number", "mend"),
        ("models: {a: {cmd: x, ttl: -2}}", "models.a.ttl: wants -1 or more, found -2", "mend"),
        ("globalTTL: -1\nmodels: {a: {cmd: x}}", "globalTTL: wants 0 or more, found -1", "mend"),
        ("models: {a: {cmd: x, proxy: 'http://h:port'}}", "models.a.proxy: not a URL", "mend"),
        ("models: [a", "not YAML", "mend"),
    ],
)
def test_wrong_files_are_told_with_their_remedy(text_: str, said: str, remedy: str) -> None:
    """Every error names the file, the key and what to do."""
    with pytest.raises(CannotImport) as raised:
        swap(text_)
    assert str(raised.value).startswith("config.yaml")
    assert said in str(raised.value)
    assert remedy in str(raised.value.remedy)
