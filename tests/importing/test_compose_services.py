"""Single services, and what is odd about them."""

from __future__ import annotations

import pytest

from modelswap.importing import report
from modelswap.importing.result import CannotImport, Imported, Kind
from tests.importing.reading import compose, noted, service

VLLM = "image: vllm/vllm-openai\n"
SGLANG = "image: lmsysorg/sglang\ncommand: sglang serve --model-path m "


def loads(imported: Imported) -> None:
    """Check that what came out is a valid config."""
    report.verify(report.text(imported, "x"), imported, {}, "x")


def test_an_unnamed_model_goes_by_its_service_and_its_id() -> None:
    """Requests that name the Hugging Face id go on to work, and people have a short name, too."""
    model, imported = service(VLLM + "command: --model org/name")
    assert list(imported.config["models"]) == ["llm"]
    assert model == {"engine": "vllm", "model": "org/name", "aliases": ["org/name"], "compose_service": "llm"}


@pytest.mark.parametrize(
    ("lines", "gpus"),
    [
        ("gpus: all", "all"),
        ("gpus: [{count: 2}]", ["0", "1"]),
        ("gpus: [{device_ids: ['GPU-1a', '3']}]", ["GPU-1a", "3"]),
        ("deploy: {resources: {reservations: {devices: [{driver: nvidia, count: 1, capabilities: [gpu]}]}}}", None),
        ("deploy: {resources: {reservations: {devices: [{driver: nvidia, count: all, capabilities: [gpu]}]}}}", "all"),
        ("runtime: nvidia", "all"),
        ("runtime: nvidia\nenvironment: {NVIDIA_VISIBLE_DEVICES: '0,2'}", ["0", "2"]),
        ("runtime: nvidia\nenvironment: {NVIDIA_VISIBLE_DEVICES: none}", None),
        ("environment: {NVIDIA_VISIBLE_DEVICES: '0,2'}", ["0", "2"]),
        ("gpus: all\nenvironment: {CUDA_VISIBLE_DEVICES: '1,2'}", ["1", "2"]),
        ("", None),
    ],
)
def test_gpus(lines: str, gpus: object) -> None:
    """Every way of asking for GPUs is understood; one of them is the config's device."""
    model, imported = service(VLLM + "command: --model org/name\n" + lines, manage=True)
    assert model.get("gpus") == gpus
    loads(imported)


def test_one_gpu_for_all_is_the_device() -> None:
    """Where all models are on the same GPU, it is said once."""
    one = "image: vllm/vllm-openai, gpus: [{device_ids: ['2']}]"
    imported = compose(
        f"services: {{a: {{{one}, command: --model org/a}}, b: {{{one}, command: --model org/b}}}}", manage=True
    )
    assert imported.config["device"] == {"index": 2}
    assert not any("gpus" in model for model in imported.config["models"].values())


def test_models_on_several_gpus_are_told_that_they_take_turns() -> None:
    """Nobody is surprised that two models on two GPUs no longer run side by side."""
    imported = compose(
        "services:\n"
        "  a: {image: vllm/vllm-openai, command: --model org/a, gpus: [{device_ids: ['0']}]}\n"
        "  b: {image: vllm/vllm-openai, command: --model org/b, gpus: [{device_ids: ['1']}]}\n"
    )
    assert noted(imported, Kind.CHANGED, "services", "a on 0; b on 1")


def test_models_that_share_a_gpu_are_told_so() -> None:
    """Two models that fit together get a hint; an adopted one must say what it takes."""
    imported = compose(
        "services:\n"
        "  a: {image: vllm/vllm-openai, command: --model org/a --gpu-memory-utilization 0.45, gpus: all}\n"
        "  b: {image: vllm/vllm-openai, command: --model org/b --gpu-memory-utilization 0.5, gpus: all}\n"
    )
    assert noted(imported, Kind.CHANGED, "services", "a, b fit onto the GPU together")
    assert noted(imported, Kind.ACTION, "services.a.command", "45%")


@pytest.mark.parametrize(
    ("lines", "device"),
    [
        ("image: ghcr.io/ggml-org/llama.cpp:server\ncommand: -m /m.gguf", "none"),
        ("image: ghcr.io/ggml-org/llama.cpp:server-cuda\ncommand: -m /m.gguf -ngl 0", "none"),
        (VLLM + "command: --model org/m\ngpus: all\nenvironment: {CUDA_VISIBLE_DEVICES: ''}", "none"),
        ("image: ghcr.io/ggml-org/llama.cpp:server-vulkan\ncommand: -m /m.gguf\ndevices: [/dev/dri]", None),
        ("image: vllm/vllm-openai-cpu:latest\ncommand: --model org/m", "none"),
        ("image: vllm/vllm-openai:latest\ncommand: --model org/m", None),
    ],
)
def test_models_without_a_gpu_run_beside(lines: str, device: str | None) -> None:
    """Only what certainly needs no GPU is said to need none."""
    model, imported = service(lines)
    assert model.get("device") == device
    loads(imported)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("shm_size: 16gb", {"shm_size": "16GiB"}),
        ("shm_size: 1000000000", {"shm_size": "1000000000"}),
        ("ipc: service:other", {}),
        ("ulimits: {memlock: {soft: -1, hard: -1}}", {"ulimits": {"memlock": -1}}),
        ("network_mode: host", {}),
        ("networks: {front: {aliases: [x]}, back: {}}", {}),
        ("extra_hosts: ['hub.local=10.0.0.5']", {"extra_hosts": ["hub.local:10.0.0.5"]}),
        ("pull_policy: if_not_present", {}),
        ("pull_policy: daily", {}),
        ("working_dir: /w", {"cwd": "/w"}),
        ("stop_grace_period: 1m30s", {"stop_grace": 90}),
        ("volumes: [anonymous]", {}),
        ("devices: ['nvidia.com/gpu=all']", {"gpus": "all"}),
        ("devices: ['nvidia.com/gpu=1', 'nvidia.com/gpu=0']", {"gpus": ["1", "0"]}),
        ("devices: [vendor.com/net=x]", {}),
        ("devices: [{source: /dev/x, target: /dev/y, permissions: rw}]", {"devices": ["/dev/x:/dev/y:rw"]}),
        ("volumes: ['${MODELS}:/m']", {"volumes": ["${MODELS}:/m"]}),
        ("volumes: ['C:\\m:/m']", {}),
        ("ulimits: {files: 3}", {}),
        ("volumes: ['named:/n']", {"volumes": ["stack_named:/n"]}),
        ("environment: [PASSED, GIVEN=x, EMPTY=]", {"env": {"PASSED": "${PASSED:-}", "GIVEN": "x", "EMPTY": ""}}),
        ("command: ['--model', 'org/name', '--hf-token', 'hf_0123456789']", {"args": ["--hf-token", "${HF_TOKEN}"]}),
    ],
)
def test_settings_of_a_container(lines: str, expected: dict[str, object]) -> None:
    """Each setting is carried over in our own spelling, or noted, and the outcome loads."""
    command = "" if "command" in lines else "command: --model org/name\n"
    model, imported = service(VLLM + command + lines, manage=True)
    plain = {"engine", "model", "aliases", "image"}
    assert {key: value for key, value in model.items() if key not in plain} == expected
    if not expected and lines != "pull_policy: if_not_present":
        key = f"services.llm.{lines.partition(':')[0]}"
        docker = imported.config.get("docker", {})
        assert docker.get("network") == "stack_front" or any(note.key.startswith(key) for note in imported.notes)
    loads(imported)


def test_an_adopted_service_that_works_against_us_is_told() -> None:
    """Restart policies, replicas, host networks and taken ports each get their note."""
    _, imported = service(
        VLLM + "command: --model org/name\nrestart: always\ndeploy: {replicas: 2}\nnetwork_mode: host\n"
        "ports: ['8888:8000', '127.0.0.1:8001:8000', '8002:8000']"
    )
    assert noted(imported, Kind.CHANGED, "services.llm.restart", '"no"')
    assert noted(imported, Kind.ACTION, "services.llm.deploy.replicas", "2 replicas")
    assert noted(imported, Kind.ACTION, "services.llm.network_mode")
    assert noted(imported, Kind.ACTION, "services.llm.ports", "8888 is the orchestrator's")
    assert noted(imported, Kind.CHANGED, "services.llm.ports", "8002")
    assert not noted(imported, Kind.CHANGED, "services.llm.ports", "8001")


@pytest.mark.parametrize("profiles", ["", "profiles: [models]"])
def test_profiles_keep_compose_from_starting_models(profiles: str) -> None:
    """Who has none is told to add one; who has one isn't."""
    _, imported = service(VLLM + "command: --model org/name\n" + profiles)
    assert noted(imported, Kind.ACTION, "services", "profiles: [models]") is not profiles.startswith("p")
    assert imported.steps == [("docker compose -f compose.yaml create llm", "")] or imported.steps[0][0].endswith(
        "create llm"
    )


def test_a_model_nobody_can_name_is_left_to_the_user() -> None:
    """A shell variable is no model's name: adopted says so, managed keeps the whole command."""
    lines = VLLM + "entrypoint: [sh, -c]\ncommand: ['vllm serve $$MODEL --port 8009']"
    adopted, imported = service(lines)
    assert adopted == {"engine": "vllm", "compose_service": "llm", "port": 8009}
    assert noted(imported, Kind.ACTION, "services.llm.command", "say model")
    loads(imported)
    managed, imported = service(lines, manage=True)
    assert managed["engine"] == "custom"
    assert managed["command"] == ["vllm serve $MODEL --port 8009"]
    assert managed["port"] == 8009
    loads(imported)


def test_names_are_given_once() -> None:
    """Two services that claim one name get two, and the loss is told."""
    imported = compose(
        "services:\n"
        "  a: {image: vllm/vllm-openai, command: --model org/x --served-model-name shared extra}\n"
        "  b: {image: vllm/vllm-openai, command: --model org/x --served-model-name shared extra}\n"
        "  c: {image: vllm/vllm-openai, command: '--model org/x --served-model-name \"has space\"'}\n"
    )
    models = imported.config["models"]
    assert list(models) == ["shared", "b", "c"]
    assert (models["shared"]["aliases"], models["b"].get("aliases")) == (["extra"], None)
    assert models["b"]["model"] == "shared"
    assert noted(imported, Kind.CHANGED, "services.b", "'shared' belongs to services.a")
    assert noted(imported, Kind.LOST, "services.b", "'extra' belongs to services.a")
    loads(imported)


def test_env_files_are_read() -> None:
    """What an env_file says is carried over, secrets as references; a missing one is noted."""
    imported = compose(
        {
            "compose.yaml": "services:\n  llm:\n    image: vllm/vllm-openai\n    command: --model org/m\n"
            "    env_file: [a.env, b.env]\n",
            "a.env": "LEVEL=info\nVLLM_API_KEY=topsecret\nHF_TOKEN=hf_0123456789\n",
        },
        manage=True,
    )
    (model,) = imported.config["models"].values()
    assert model["env"] == {"LEVEL": "info", "HF_TOKEN": "${HF_TOKEN}"}
    assert model["api_key"] == "${VLLM_API_KEY}"
    assert noted(imported, Kind.LOST, "services.llm.env_file", "/stack/b.env")
    assert "topsecret" not in repr(imported)


def test_values_that_were_filled_in_are_named() -> None:
    """Whoever changes .env later knows that this file doesn't follow; what isn't set stays a reference."""
    imported = compose(
        {
            "compose.yaml": "services: {llm: {image: 'vllm/vllm-openai:${TAG}', command: '--model ${WHICH}'}}",
            ".env": "TAG=v9",
        },
        manage=True,
    )
    (model,) = imported.config["models"].values()
    assert (model["image"], model["model"]) == ("vllm/vllm-openai:v9", "${WHICH}")
    assert noted(imported, Kind.CHANGED, "", "TAG")
    assert noted(imported, Kind.ACTION, "", "WHICH is not set")
    assert imported.variables == {"WHICH"}
    loads(imported)


def test_a_secret_that_is_a_default_is_not_copied() -> None:
    """``${KEY:-literal}`` becomes ``${KEY}``, and the user is told that it must be set now."""
    model, imported = service(VLLM + "command: --model org/m --api-key ${VLLM_API_KEY:-token-abc123}")
    assert model["api_key"] == "${VLLM_API_KEY}"
    assert noted(imported, Kind.ACTION, "", "the default of VLLM_API_KEY")
    assert "abc123" not in report.text(imported, "x") + repr(imported)


def test_neighbours() -> None:
    """Gateways, who talks to a model itself, other servers, holders of the GPU are told; the rest is left alone."""
    imported = compose(
        "services:\n"
        "  llm: {image: vllm/vllm-openai, command: --model org/m, container_name: the-llm}\n"
        "  litellm: {image: 'ghcr.io/berriai/litellm:main', command: '--api_base http://the-llm:8000'}\n"
        "  nginx: {image: 'nginx:1'}\n"
        "  swapper: {build: ., volumes: ['/var/run/docker.sock:/var/run/docker.sock']}\n"
        "  llm-router: {build: ./router}\n"
        "  comfy: {image: yanwk/comfyui-boot, gpus: all}\n"
        "  trainer: {image: pytorch/pytorch, runtime: nvidia}\n"
        "  ui: {image: ui, environment: {URL: 'http://llm:8000/v1'}, depends_on: {llm: {condition: service_started}}}\n"
        "  db: {image: postgres}\n"
    )
    assert imported.ignored == ["db"]
    assert noted(imported, Kind.ACTION, "services.litellm", "swaps them")
    assert noted(imported, Kind.ACTION, "services.litellm.command", "talks to llm")
    assert noted(imported, Kind.CHANGED, "services.nginx")
    assert noted(imported, Kind.ACTION, "services.swapper", "drives Docker")
    assert noted(imported, Kind.ACTION, "services.llm-router", "your own")
    assert noted(imported, Kind.LOST, "services.comfy", "engine: custom")
    assert noted(imported, Kind.CHANGED, "services.comfy", "GPU")
    assert noted(imported, Kind.CHANGED, "services.trainer", "GPU")
    assert noted(imported, Kind.ACTION, "services.ui.environment.URL", "talks to llm")
    assert noted(imported, Kind.ACTION, "services.ui.depends_on", "take llm out")


def test_a_file_without_a_model_is_refused() -> None:
    """The error names the services that there are, what is known, and how to go on by hand."""
    with pytest.raises(CannotImport, match=r"none of its services \(web, db\)") as raised:
        compose("services: {web: {image: nginx}, db: {image: postgres}}")
    assert "engine: custom" in str(raised.value.remedy)


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ("image: [a]", "services.llm.image"),
        ("ports: 8000", "services.llm.ports"),
        ("environment: 5", "services.llm.environment"),
        ("command: 'unclosed \"quote'", "services.llm.command"),
        ("volumes: {a: b}", "services.llm.volumes"),
        ("deploy: [x]", "services.llm.deploy"),
        ("devices: [{a: b}]", "services.llm.devices"),
    ],
)
def test_a_key_of_the_wrong_kind_is_named(lines: str, key: str) -> None:
    """What Compose itself would refuse ends in an error that names the key."""
    with pytest.raises(CannotImport) as raised:
        service(VLLM + lines if "image" not in lines else lines)
    assert str(raised.value).startswith(f"{key}:")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (SGLANG + "--max-running-requests 8", {"concurrency": 8}),
        (SGLANG + "--is-embedding", {"canary": "embedding"}),
        (SGLANG + "--port 9", {"port": 9}),
        (SGLANG + "--device cpu", {"device": "none"}),
        (
            SGLANG + "--enable-memory-saver --enable-weights-cpu-backup",
            {"sleep": "on"},
        ),
        (SGLANG + "--enable-memory-saver", {}),
        (VLLM + "command: --model m --enable-sleep-mode\nenvironment: {VLLM_SERVER_DEV_MODE: 1}", {"sleep": "on"}),
        (VLLM + "command: --model m --enable-sleep-mode", {}),
        (VLLM + "command: --model m --task score", {"canary": "none"}),
        (VLLM + "command: --model m --runner pooling --convert classify", {"canary": "none"}),
        (VLLM + "command: --model m --runner pooling", {"canary": "embedding"}),
    ],
)
def test_what_modelswap_must_know_of_an_adopted_engine(lines: str, expected: dict[str, object]) -> None:
    """It can't read somebody else's arguments, so what they say is written down."""
    model, imported = service(lines)
    kind = "sglang" if "sglang" in lines else "vllm"
    assert model == {"engine": kind, "model": "m", "aliases": ["m"], "compose_service": "llm", **expected}
    loads(imported)


def test_a_share_of_the_gpu_is_asked_about() -> None:
    """SGLang's is told like vLLM's, and both count for what fits together."""
    imported = compose(
        "services:\n"
        "  a: {image: lmsysorg/sglang, command: sglang serve --model-path org/a --mem-fraction-static 0.4, gpus: all}\n"
        "  b: {image: vllm/vllm-openai, command: --model org/b --gpu-memory-utilization 0.5, gpus: all}\n"
    )
    assert noted(imported, Kind.ACTION, "services.a.command", "40%")
    assert noted(imported, Kind.CHANGED, "services", "a, b fit onto the GPU together")


def test_a_reranker_of_vllm_is_not_asked_for_an_embedding() -> None:
    """Its engine would ask it for one, and it would never be ready."""
    model, imported = service(VLLM + "command: --model org/m --task score", manage=True)
    assert model["canary"] == "none"
    loads(imported)


@pytest.mark.parametrize(
    ("lines", "env"),
    [
        (
            "image: ghcr.io/huggingface/text-generation-inference:3\nenvironment: {MODEL_ID: org/m, PORT: 3000}",
            {"MODEL_ID": "org/m", "PORT": "3000"},
        ),
        ("image: ollama/ollama\nenvironment: ['OLLAMA_HOST=0.0.0.0:1234']", {"OLLAMA_HOST": "0.0.0.0:1234"}),
        (
            "image: x\ncommand: sh -c 'llama-server'\nenvironment: {LLAMA_ARG_MODEL: /m.gguf, LLAMA_API_KEY: k}",
            {"LLAMA_ARG_MODEL": "/m.gguf", "LLAMA_API_KEY": "${LLAMA_API_KEY}"},
        ),
    ],
)
def test_what_is_started_as_it_was_keeps_its_environment(lines: str, env: dict[str, str]) -> None:
    """Nobody else tells it its model, port and key."""
    model, imported = service(lines, manage=True)
    assert (model["engine"], model["env"]) == ("custom", env)
    loads(imported)


def test_the_gpu_that_a_process_sees_is_the_device() -> None:
    """A container that is given all GPUs and told to use one of them is on that one."""
    one = "image: vllm/vllm-openai, command: --model org/a, gpus: all, environment: [CUDA_VISIBLE_DEVICES=1]"
    adopted, managed = (compose(f"services: {{a: {{{one}}}}}", manage=manage) for manage in (False, True))
    assert adopted.config["device"] == managed.config["device"] == {"index": 1}
    # modelswap gives it the one: it would look for a second there.
    assert "env" not in managed.config["models"]["a"]
    loads(managed)


@pytest.mark.parametrize("manage", [False, True])
def test_adapters_keep_their_names(*, manage: bool) -> None:
    """Requests that name a LoRA adapter still reach it; a name that is taken is told."""
    imported = compose(
        "services:\n"
        "  a:\n    image: vllm/vllm-openai\n"
        '    command: [--model, org/a, --lora-modules, sql=/l/sql, \'{"name": "chat", "path": "/l"}\', b=/l/b]\n'
        "  b: {image: vllm/vllm-openai, command: --model org/b}\n",
        manage=manage,
    )
    assert imported.config["models"]["a"]["adapters"] == ["sql", "chat"]
    assert noted(imported, Kind.LOST, "services.a", "the name 'b' belongs to services.b")
    loads(imported)


@pytest.mark.parametrize("manage", [False, True])
@pytest.mark.parametrize(
    ("variable", "canary"), [("LLAMA_ARG_EMBEDDINGS", "embedding"), ("LLAMA_ARG_RERANKING", "none")]
)
def test_what_llama_cpp_is_told_by_variables(variable: str, canary: str, *, manage: bool) -> None:
    """An embedder is asked for an embedding, also where its arguments don't say that it is one."""
    model, imported = service(
        f"image: ggml-org/llama.cpp:server\nenvironment: {{LLAMA_ARG_MODEL: /m.gguf, {variable}: true}}", manage=manage
    )
    assert model["canary"] == canary
    loads(imported)


@pytest.mark.parametrize(
    ("lines", "port"),
    [
        (VLLM + "ports: ['8005:8006']", 8006),
        (VLLM + "command: bash -c 'vllm serve org/m --port $$PORT'\nexpose: [8009]", 8009),
        (VLLM + "command: --model org/m\nports: ['9000:9000']", None),
        (VLLM + "ports: ['8005:8000', '9000:9000']", None),
    ],
)
def test_a_port_that_the_command_does_not_tell(lines: str, port: int | None) -> None:
    """Where an image or a shell says it, what is published tells more than what is usual."""
    model, _ = service(lines)
    assert model.get("port") == port


def test_a_service_to_extend_is_no_model() -> None:
    """One that names no model and that others are made of is left alone."""
    imported = compose(
        "services:\n"
        "  base: {image: vllm/vllm-openai, gpus: all}\n"
        "  a: {extends: base, command: --model org/a}\n"
        "  b: {extends: {service: a}, command: --model org/b}\n"
    )
    assert list(imported.config["models"]) == ["a", "b"]


@pytest.mark.parametrize(("line", "key"), [("scale: 0", "scale"), ("deploy: {replicas: 0}", "deploy.replicas")])
def test_no_replicas_are_no_container(line: str, key: str) -> None:
    """Compose would create none, and there would be nothing to adopt."""
    _, imported = service(VLLM + f"command: --model org/m\n{line}")
    assert noted(imported, Kind.ACTION, f"services.llm.{key}", "makes no container")


def test_what_ollama_is_told_to_pull_over_http_is_known() -> None:
    """Who pulls with curl names the model in JSON."""
    imported = compose(
        "services:\n"
        "  ollama: {image: ollama/ollama, gpus: all}\n"
        "  pull:\n    image: curlimages/curl\n"
        '    command: curl http://ollama:11434/api/pull -d \'{"name":"llama3.2:3b"}\'\n'
    )
    assert imported.config["models"]["ollama"]["adapters"] == ["llama3.2:3b"]


def test_a_line_may_end_in_a_backslash() -> None:
    """It goes on in the next one, as in a shell."""
    model, _ = service(VLLM + "command: |\n  --model org/m \\\n  --max-num-seqs 4 \\\n  --port 8001")
    assert (model["model"], model["concurrency"], model["port"]) == ("org/m", 4, 8001)


@pytest.mark.parametrize(
    ("script", "kept"),
    [
        ("vllm serve org/m --api-key plain-key", "vllm serve org/m --api-key ${VLLM_API_KEY}"),
        ("vllm serve org/m --api-key='plain-key' --port 9", "vllm serve org/m --api-key='${VLLM_API_KEY}' --port 9"),
        ("export HF_TOKEN=plain-key; vllm serve org/m", "export HF_TOKEN=${HF_TOKEN}; vllm serve org/m"),
        ("echo hf_0123456789abcdef >t && vllm serve org/m", "echo ${HF_TOKEN} >t && vllm serve org/m"),
        ("vllm serve org/m --api-key $$KEY --max-model-len 9", "vllm serve org/m --api-key $KEY --max-model-len 9"),
        ("MAX_TOKENS=100 vllm serve org/m --tokenizer x", "MAX_TOKENS=100 vllm serve org/m --tokenizer x"),
    ],
)
def test_no_secret_is_copied_in_a_script(script: str, kept: str) -> None:
    """What a shell is told holds no key either; what only looks a bit like one stays."""
    lines = f'image: vllm/vllm-openai\nentrypoint: [bash, -c]\ncommand: ["{script}"]'
    model, imported = service(lines, manage=True)
    assert model["command"] == [kept]
    assert noted(imported, Kind.ACTION, "services.llm.command", "not copied") is ("$" in kept)
    loads(imported)


def test_no_secret_is_copied_in_a_variable_of_options() -> None:
    """Some images take their options as one variable."""
    model, imported = service(
        VLLM + "command: --model org/m\nenvironment: {EXTRA: '--api-key plain-key --x'}", manage=True
    )
    assert model["env"] == {"EXTRA": "--api-key ${VLLM_API_KEY} --x"}
    assert noted(imported, Kind.ACTION, "services.llm.environment", "not copied")
