"""Models in containers: what the config file may say of them, and what is said about the rest."""

from __future__ import annotations

import pytest

from modelswap.spec import shape, volumes
from modelswap.spec.config import Model
from modelswap.spec.errors import ConfigError
from modelswap.spec.load import loads

MADE = "set it where the container is made (the compose file)"
KEEP = "keep one: a container that exists ('container', 'compose_service'), or an 'image' to make one from"


def problems(text: str, env: dict[str, str] | None = None) -> list[str]:
    """Return what is said about ``text``, without the file and line."""
    with pytest.raises(ConfigError) as caught:
        loads(text, env or {}, "m.yaml")
    return [str(problem).partition(": ")[2] for problem in caught.value.problems]


def load(text: str, env: dict[str, str] | None = None) -> Model:
    """Return the model ``a`` of a file that has nothing else."""
    return loads(f"models: {{a: {{{text}}}}}", env or {}).models["a"]


@pytest.mark.parametrize(
    ("text", "runtime"),
    [
        ("model: m", "process"),
        ("container: mistral-llm", "adopted"),
        ("container: mistral-llm, model: org/m, port: 8000, api_key: k, concurrency: 8, memory: 5GiB", "adopted"),
        ("compose_service: mistral", "adopted"),
        ("engine: llamacpp, compose_service: m.1-a_b", "adopted"),
        ("engine: custom, container: tgi, port: 80, ready: /ready", "adopted"),
        ("image: vllm/vllm-openai, model: m", "managed"),
        ("engine: custom, image: tgi", "managed"),
        ("engine: custom, image: tgi, command: [--port, '{port}']", "managed"),
        ("engine: custom, image: tgi, entrypoint: [], command: [serve]", "managed"),
        ("image: , container: , model: m", "process"),
        ("image: , container: c1, args: , command: ", None),
    ],
)
def test_what_is_declared_says_what_hosts_it(text: str, runtime: str | None) -> None:
    """Each right way to say where a model runs is accepted, and a key with nothing in it is no key."""
    if runtime is None:
        assert problems(f"models: {{a: {{{text}}}}}") == [
            "models.a.args: wants a list, found nothing; give a value, or leave the key out"
        ]
    else:
        assert load(text).runtime == runtime


@pytest.mark.parametrize(
    "image",
    [
        "vllm/vllm-openai",
        "vllm/vllm-openai:v0.33.0",
        "registry.local:5000/a/b_c/d-e:V1.x",
        "LOCALHOST:5000/a",
        "a@sha256:" + "0" * 64,
        "a:b@sha256:" + "0" * 64,
        "sha256:" + "0" * 64,
        "0123456789ab",
    ],
)
def test_every_way_to_name_an_image(image: str) -> None:
    """Host, port, path, tag and digest, as Docker reads them."""
    assert load(f"model: m, image: '{image}'").image == image


def test_all_of_an_image_is_read() -> None:
    """Each key has its value, and numbers in lists of texts need no quotes."""
    model = load(
        "model: m, image: i, entrypoint: [vllm, serve], volumes: [/srv/a:/a:ro, 'cache:/c', '/x:/y:rw,z'],"
        " gpus: [0, GPU-8a1c-00, nvidia.com/gpu=all], devices: [/dev/kfd], shm_size: 8GiB, ipc: host,"
        " ulimits: {memlock: -1, nofile: 4096}, network: my-net, pull: always, port: 80,"
        " extra_hosts: [hub:10.0.0.5, 'six:::1', 'seven:[::1]', box:host-gateway]"
    )
    assert model.gpus == ["0", "GPU-8a1c-00", "nvidia.com/gpu=all"]
    assert model.shm_size == 8 << 30 and model.ulimits == {"memlock": -1, "nofile": 4096}
    assert [str(volumes.parse(text)) for text in model.volumes] == ["/srv/a:/a:ro", "cache:/c", "/x:/y:rw,z"]


ONE = [
    ("container: c1, image: i, model: m", f"models.a.image: not together with 'container'; {KEEP}"),
    ("container: c1, compose_service: s", f"models.a.compose_service: not together with 'container'; {KEEP}"),
    ("container: c1, args: [--x]", f"args: not with 'container': that container has it already; {MADE}"),
    ("container: c1, command: [x]", f"command: not with 'container': that container has it already; {MADE}"),
    ("compose_service: s, program: [x]", f"program: not with 'compose_service': that container has it already; {MADE}"),
    ("compose_service: s, env: {A: b}", f"env: not with 'compose_service': that container has it already; {MADE}"),
    ("compose_service: s, cwd: /x", f"cwd: not with 'compose_service': that container has it already; {MADE}"),
    ("container: c1, volumes: ['v1:/x']", f"models.a.volumes: only with 'image'; {MADE}"),
    ("container: c1, gpus: all", f"models.a.gpus: only with 'image'; {MADE}"),
    ("model: m, shm_size: 1GiB", "models.a.shm_size: only with 'image'; say which 'image', or leave it out"),
    ("model: m, pull: always", "models.a.pull: only with 'image'; say which 'image', or leave it out"),
    ("model: m, port: 80", "models.a.port: only for models in a container; a process is given a free port each time"),
    ("engine: openvino, image: i, model: m", "models.a.image: engine 'openvino' runs in no container; leave it out"),
    ("engine: openvino, container: c1", "models.a.container: engine 'openvino' runs in no container; leave it out"),
    ("image: i", "models.a: engine 'vllm' (the engine when none is given) needs a 'model'"),
    ("image: i, model: m, program: [x]", "models.a.program: not with 'image'; say 'entrypoint', or leave it out"),
    ("image: i, model: m, command: [x]", "another program into 'entrypoint'"),
    ("image: i, model: m, entrypoint: ['']", "models.a.entrypoint: names no program; e.g. entrypoint: [vllm, serve]"),
    ("image: i, engine: custom, command: []", "models.a.command: names no program"),
    ("image: Vllm, model: m", "models.a.image: not an image's name; e.g. vllm/vllm-openai:"),
    (f"image: {'a' * 500}, model: m", "models.a.image: not an image's name"),
    ("image: '', model: m", "models.a.image: not an image's name"),
    ("container: -x", "models.a.container: not a container's name; `docker ps -a` shows them"),
    ("container: ''", "models.a.container: not a container's name"),
    ("compose_service: a b", "models.a.compose_service: not a compose service's name"),
    ("image: i, model: m, volumes: [/x]", "models.a.volumes[0]: wants SOURCE:TARGET, e.g. /srv/models:/models:ro"),
    ("image: i, model: m, volumes: ['/x:']", "models.a.volumes[0]: wants SOURCE:TARGET"),
    ("image: i, model: m, volumes: ['/x:y']", "models.a.volumes[0]: its target must be absolute"),
    ("image: i, model: m, volumes: ['./x:/y']", "models.a.volumes[0]: its source must be absolute (Docker knows"),
    ("image: i, model: m, volumes: ['~/x:/y']", "models.a.volumes[0]: its source must be absolute (Docker knows"),
    ("image: i, model: m, volumes: ['a/b:/y']", "models.a.volumes[0]: its source is neither an absolute folder nor"),
    ("image: i, model: m, volumes: ['/x:/y:wr']", "models.a.volumes[0]: after its target only ro or rw"),
    ("image: i, model: m, volumes: ['/x:/y:']", "models.a.volumes[0]: after its target only ro or rw"),
    ("image: i, model: m, volumes: ['/x:/y:ro,rw']", "models.a.volumes[0]: after its target only ro or rw"),
    ("image: i, model: m, volumes: ['/x:/']", "models.a.volumes[0]: would replace all of the image"),
    (
        "image: i, model: m, volumes: ['/x:/y', '/z:/y/']",
        "models.a.volumes[1]: has the same target as models.a.volumes[0]; give one of them another",
    ),
    ("image: i, model: m, gpus: []", "models.a.gpus: names no GPU; say gpus: none for a model that needs none"),
    ("image: i, model: m, gpus: [all]", "models.a.gpus[0]: 'all' doesn't stand in a list; write gpus: all"),
    ("image: i, model: m, gpus: [first]", "models.a.gpus[0]: not a GPU; wants an index such as 0, or a UUID"),
    (
        "image: i, model: m, gpus: 0",
        "models.a.gpus: wants one of auto, all, none, or a list, found the number 0; write a list as [first, second]",
    ),
    (
        "image: i, model: m, gpus: al",
        "models.a.gpus: wants one of auto, all, none, or a list, found the text 'al'; did you mean 'all'?",
    ),
    ("image: i, model: m, gpus: [[0]]", "models.a.gpus[0]: wants a text, found a list"),
    ("image: i, model: m, devices: [kfd]", "models.a.devices[0]: not a device file; e.g. /dev/kfd"),
    ("image: i, model: m, ipc: hots", "models.a.ipc: wants one of host, private, shareable, none, container:NAME; did"),
    ("image: i, model: m, ulimits: {memlok: 1}", "models.a.ulimits.memlok: not a resource limit; did you mean 'memlo"),
    ("image: i, model: m, ulimits: {memlock: -2}", "models.a.ulimits.memlock: must be at least -1; -1 means no limit"),
    (
        "image: i, model: m, ulimits: {memlock: {soft: 1}}",
        "models.a.ulimits.memlock: wants a whole number, found a map",
    ),
    ("image: i, model: m, network: host", "models.a.network: 'host' would open the engine to whoever reaches"),
    ("image: i, model: m, network: none", "models.a.network: the engine could not be reached there"),
    ("image: i, model: m, network: a b", "models.a.network: not a network's name; `docker network ls` shows them"),
    ("image: i, model: m, extra_hosts: [a]", "models.a.extra_hosts[0]: wants NAME:ADDRESS"),
    ("image: i, model: m, extra_hosts: ['a:b']", "models.a.extra_hosts[0]: wants NAME:ADDRESS"),
    ("image: i, model: m, pull: mising", "models.a.pull: wants one of missing, always, never"),
    ("image: i, model: m, port: 0", "models.a.port: must be at least 1, found the number 0"),
    ("image: i, model: m, volume: []", "models.a.volume: unknown key; did you mean 'volumes'?"),
]


@pytest.mark.parametrize(("text", "expected"), ONE)
def test_one_problem_is_told_once_with_its_remedy(text: str, expected: str) -> None:
    """Each mistake with a container gives exactly its own line."""
    (said,) = problems(f"models: {{a: {{{text}}}}}")
    assert expected in said


def test_args_of_a_fixed_command_say_what_to_say_instead() -> None:
    """Who wants to tell us --max-num-seqs learns that ``concurrency`` does."""
    (said,) = problems("models: {a: {container: c1, args: [--max-num-seqs, 8]}}")
    assert said.endswith("what modelswap must know of it goes into 'concurrency' and 'memory'")


@pytest.mark.parametrize(("key", "what"), [("container", "container"), ("compose_service", "compose service")])
def test_a_container_serves_one_model(key: str, what: str) -> None:
    """Two models can't be in one container, since one of them must be out while the other is in."""
    (said,) = problems(f"models:\n  a: {{{key}: llm}}\n  b: {{{key}: other}}\n  c: {{{key}: llm}}")
    assert said == (
        f"models.c.{key}: this {what} belongs to models.a already; a container serves one model;"
        " say 'aliases' or 'adapters' for more names"
    )


def test_a_container_and_a_service_of_one_name_are_two() -> None:
    """Compose names its containers after project and service."""
    config = loads("models: {a: {container: llm}, b: {compose_service: llm}}", {})
    assert {model.runtime for model in config.models.values()} == {"adopted"}


@pytest.mark.parametrize(
    ("docker", "expected"),
    [
        ("host: /var/run/docker.sock", "docker.host: not an address of Docker; write unix:///var/run/docker.sock or"),
        ("host: 'unix://x'", "docker.host: not an address of Docker"),
        ("host: 'tcp://x'", "docker.host: not an address of Docker"),
        ("host: 'tcp://x:99999999999999999999'", "docker.host: not an address of Docker"),
        ("host: 'ssh://u@h'", "docker.host: not an address of Docker; forward it (ssh -NL"),
        ("project: My Project", "docker.project: not a compose project's name"),
        ("network: host", "docker.network: 'host' would open the engine"),
        ("hf_cache: ./cache", "docker.hf_cache: not something to mount; an absolute folder of Docker's machine, or a"),
        ("compile_cache: ./x", "docker.compile_cache: not something to mount; an absolute folder of Docker's machine"),
        ("compile_cache: ''", "docker.compile_cache: not something to mount"),
        ("compile_cache: true", "docker.compile_cache: wants a volume's name, a folder, or false for none"),
        ("hots: x", "docker.hots: unknown key; did you mean 'host'?"),
    ],
)
def test_the_section_docker(docker: str, expected: str) -> None:
    """Where Docker is, and what we use of it, is looked at before it is used."""
    (said,) = problems(f"models: {{a: {{model: m}}}}\ndocker: {{{docker}}}")
    assert expected in said


def test_a_right_section_docker() -> None:
    """Both kinds of address, volumes and folders are taken."""
    text = "models: {{a: {{model: m}}}}\ndocker: {{host: '{}', project: llm, network: llm_default, hf_cache: {}}}"
    for host, cache in (
        ("unix:///run/d.sock", "/srv/hf"),
        ("tcp://10.0.0.1:2375", "hf-cache"),
        ("tcp://[::1]:1", "hf"),
    ):
        assert loads(text.format(host, cache), {}).docker.host == host


@pytest.mark.parametrize(
    ("said", "cache"),
    [
        ("network: llm", "modelswap-compile-cache"),
        ("compile_cache: false", None),
        ("compile_cache: null", None),
        ("compile_cache: /srv/compiled", "/srv/compiled"),
        ("compile_cache: ${CACHE:-modelswap-compile-cache}", "of-my-own"),
        ("compile_cache: ${OFF:-modelswap-compile-cache}", None),
    ],
)
def test_where_compiled_code_is_kept(said: str, cache: str | None) -> None:
    """A volume by default, another volume or a folder, or nowhere; also from a variable."""
    found = loads(f"models: {{a: {{model: m}}}}\ndocker:\n  {said}", {"CACHE": "of-my-own", "OFF": "false"})
    assert found.docker.compile_cache == cache


def test_a_variable_that_is_missing_is_one_problem() -> None:
    """What could not be read is not looked at again."""
    text = 'models: {a: {model: m, image: "${NONE}", volumes: ["${NONE}"], network: "${NONE}", ipc: "${NONE}"}}'
    said = problems(text + '\ndocker: {host: "${NONE}"}')
    assert len(said) == 5 and all("the environment variable NONE is not set" in line for line in said)


def test_what_came_from_the_environment_is_never_shown() -> None:
    """Not even where a whole list is wrong."""
    text = 'models: {a: {model: m, image: "${X}", gpus: "${X}", volumes: ["${X}"], extra_hosts: ["${X}"]}}'
    said = problems(text, {"X": "S3CRET x"})
    assert len(said) == 4 and "S3CRET" not in "".join(said)


def test_a_key_that_takes_a_word_or_a_list() -> None:
    """The file's shape knows both, for hints and for numbers without quotes."""
    gpus = ("models", "a", "gpus")
    assert shape.choices(gpus) == ("auto", "all", "none") and shape.also_lists(gpus) and shape.takes_text(gpus)
    assert shape.takes_scalars_as_written((*gpus, 0)) and not shape.takes_scalars_as_written(gpus)
    assert not shape.also_lists(("models", "a", "args"))


def test_a_volume_knows_what_it_is() -> None:
    """A folder or a volume, for reading only or not."""
    folder, volume = volumes.parse("/a:/b:ro,z"), volumes.parse("cache:/b")
    assert folder.is_folder and folder.read_only and folder.options == ("ro", "z")
    assert not volume.is_folder and not volume.read_only and str(volume) == "cache:/b"
