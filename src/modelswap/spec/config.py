"""The config file's shape: strict pydantic models, everything defaulted.

Durations are in seconds. How a file becomes a `Config` (YAML, ``${ENV}``, errors with line numbers): `spec.load`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, SecretStr, model_validator

from modelswap.spec.fields import Bytes, Cache, Location, Port, Seconds, SomeSeconds

RuntimeName = Literal["process", "adopted", "managed"]
"""``adopted``: a container that somebody else made; ``managed``: one that we make."""
EngineName = Literal["vllm", "llamacpp", "openvino", "sglang", "custom"]


class Strict(BaseModel):
    """Base of every section: unknown keys are errors, values are not coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Hook(Strict):
    """An HTTP request or a command; one of `url` and `command` is given."""

    url: str | None = None
    """Where to send a request: `http(s)://…`, or a path such as `/slots/0?action=save` of the engine itself."""
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"] = "POST"
    """With `url`. Only an answer with status 2xx is a success."""
    body: dict[str, Any] | None = None
    """With `url`: sent as JSON."""
    command: list[str] | None = None
    """A program and its arguments; never run through a shell. Exit status 0 is a success.

    In its environment are `MODELSWAP_MODEL`, `MODELSWAP_HOOK` (e.g. `after_load`) and `MODELSWAP_URL` (the engine's
    address, empty while it doesn't run).
    """
    timeout: SomeSeconds = 30.0
    """Then the request is given up, or the command killed, and it has failed."""
    on_failure: Literal["ignore", "fail"] = "ignore"
    """`ignore`: log it and go on; `fail`: the load fails (only in `before_load` and `after_load`)."""


class Hooks(Strict):
    """What to do around loads and unloads, each in turn; waking and sleeping count as loading and unloading."""

    before_load: list[Hook] = []
    """Before the engine starts or wakes, when the device is free."""
    after_load: list[Hook] = []
    """When the engine is ready, before it gets requests."""
    before_unload: list[Hook] = []
    """When its last request has ended, before it is stopped or sleeps."""
    after_unload: list[Hook] = []
    """When it has ended or sleeps, and its memory is free."""


class Model(Strict):
    """One model that requests can name."""

    engine: EngineName = "vllm"
    """The inference server program that serves this model."""
    model: str | None = None
    """What the engine loads: a Hugging Face id, a folder or a file (in the container, if it runs in one).

    For `custom`, and with `container` or `compose_service`: the name the server knows it by.
    """
    args: list[str] = []
    """More command line arguments for the engine."""
    command: list[str] | None = None
    """`custom` only: the command to run; `{port}` and `{host}` are replaced. Never run through a shell.

    With an `image` it follows its entrypoint, and may be left out.
    """
    program: list[str] | None = None
    """How to start the engine's own program, if not found by itself, e.g. `[/opt/llama/llama-server]`.

    Not in containers: an `image` has its `entrypoint`.
    """
    env: dict[str, str] = {}
    """Environment variables for the engine, on top of the orchestrator's own (with `image`: of the image's)."""
    cwd: Location | None = None
    """The engine's working directory."""
    container: str | None = None
    """An existing container that serves this model: it is started and stopped, never created or removed."""
    compose_service: str | None = None
    """Like `container`, found by its compose service (`docker.project` says of which project)."""
    image: str | None = None
    """A container image to serve this model from: its container is created, reused and removed by modelswap."""
    entrypoint: list[str] | None = None
    """`image` only: runs instead of the image's own entrypoint; the engine's arguments follow."""
    volumes: list[str] = []
    """`image` only: mounts, `/host/folder:/folder[:ro]` or `volume:/folder[:ro]`."""
    gpus: Literal["auto", "all", "none"] | list[str] = "auto"
    """`image` only: GPUs it sees, by index or UUID. `auto`: the `device` of this file, if Docker can give GPUs.

    Where the `device` is an AMD GPU, `auto`, `all` and indices give device files (`/dev/kfd`, `/dev/dri/renderD…`) and
    their groups.
    """
    devices: list[str] = []
    """`image` only: device files it sees. If `/dev/kfd` or one of `/dev/dri` is among them, `gpus: auto` adds none."""
    shm_size: Bytes | None = None
    """`image` only: shared memory; tensor parallelism wants some GiB, or `ipc: host`."""
    ipc: str | None = None
    """`image` only: IPC namespace, e.g. `host`."""
    ulimits: dict[str, int] = {}
    """`image` only: resource limits, e.g. `memlock: -1`."""
    network: str | None = None
    """`image` only: the network it joins. Default: `docker.network`."""
    extra_hosts: list[str] = []
    """`image` only: more host names, `name:address`."""
    pull: Literal["missing", "always", "never"] = "missing"
    """`image` only: when to pull the image; always ahead of time, before anything is put out."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Where it listens inside its container. Default: the port it exposes, else the engine's usual one."""
    ready: Annotated[str, Field(pattern="^/")] = "/health"
    """`custom` only: the path that answers 200 when the engine is ready."""
    aliases: list[str] = []
    """Other names that requests may use."""
    adapters: list[str] = []
    """Names (LoRA adapters) that are routed to this model and passed on unchanged."""
    concurrency: Annotated[int, Field(ge=1)] | None = None
    """Requests running at once (slots); the rest wait in the gateway. Default: what the engine runs at once."""
    api_key: SecretStr | None = None
    """Sent to the engine as a bearer token, and never logged."""
    device: Literal["gpu", "none"] = "gpu"
    """`none`: needs no GPU, runs beside the others and is never swapped out."""
    memory: Bytes | None = None
    """Device memory that must be free before this model starts, e.g. `12GiB`. Default: what the engine tells."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Models with a higher priority are served as if their requests had waited longer (scheduling.priority_boost)."""
    canary: Literal["completion", "chat", "embedding", "none"] | None = None
    """A request that must succeed before the model is opened. Default: by engine; `custom`: none."""
    start_timeout: Seconds = 1800.0
    """How long a start may take until it is given up; a first start may compile."""
    stop_grace: Seconds | None = None
    """How long the engine may take to stop after SIGTERM before it is killed. Default: by engine."""
    health_interval: Seconds = 10.0
    """How often a ready engine is asked for its health; 0 = never. Three misses in a row mean it hangs."""

    sleep: Literal["auto", "on", "off"] = "auto"
    """Whether a model that is swapped out may keep its process and wake later (vLLM and SGLang on a GPU).

    `auto`: if its arguments and environment allow it (those of a `container` or `compose_service` are looked at). `on`:
    it is started so that it can; of a `container` or `compose_service` it is taken for granted. `off`: never.
    """
    standby: bool = True
    """vLLM only: keep a process waiting that has imported everything, and becomes this model's server when asked."""
    ttl: SomeSeconds | None = None
    """A model that had nothing to do for so long is put out. Default: it stays until another one is wanted."""
    idle: Literal["sleep", "stop", "keep"] = "sleep"
    """What to do after `ttl`: sleep (if it can, else stop), stop, or nothing."""
    pin: bool = False
    """Once it is there it is not left for other models: requests for those are refused."""
    preload: bool = False
    """Brought in at start, if its device has nothing; of several the first."""
    hooks: Hooks = Hooks()
    """HTTP calls or commands around loads and unloads."""

    @property
    def runtime(self) -> RuntimeName:
        """What hosts it: follows from what is declared."""
        if self.image is not None:
            return "managed"
        return "process" if self.container is None and self.compose_service is None else "adopted"


class Gateway(Strict):
    """The data plane: the OpenAI-compatible address that clients use."""

    host: str = "127.0.0.1"
    port: Port = 8080
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Worker processes that share the port."""
    progress_after: Seconds = 10.0
    """A streamed request that has waited this long gets its 200 and SSE comments with its position; 0 = never."""
    max_body: Bytes = ByteSize(64 * 1024 * 1024)
    """The largest request body; a larger one gets 413."""
    max_headers: Bytes = ByteSize(64 * 1024)
    """The largest request head; a larger one gets 431."""
    header_timeout: Seconds = 15.0
    """How long a client may take to send a request's headers and body before it gets 408."""
    idle_timeout: Seconds = 75.0
    """How long a client's connection may be idle between requests."""


class Orchestrator(Strict):
    """The control plane: swaps, status, metrics."""

    host: str = "127.0.0.1"
    port: Port = 8888
    allowed_hosts: list[str] = []
    """More names under which the admin API may be addressed; loopback names and `host` always may."""
    term: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    """How long a gateway may be silent before its leases are broken."""
    state_dir: Location | None = None
    """Journal, database, engine logs, token. Default: `$XDG_STATE_HOME/modelswap`."""
    engine_ports: Annotated[str, Field(pattern=r"^[0-9]{1,5}-[0-9]{1,5}$")] | None = None
    """Loopback ports for engines, `first-last`. Default: 10,000 outside the kernel's ephemeral range."""
    log_size: Bytes = ByteSize(16 * 1024 * 1024)
    """An engine's log file is rotated at this size; three are kept per model."""

    @property
    def ports(self) -> range | None:
        """The ports of `engine_ports`; None for the default."""
        if self.engine_ports is None:
            return None
        first, last = map(int, self.engine_ports.split("-"))
        return range(first, last + 1)

    @model_validator(mode="after")
    def _ports_are_a_range(self) -> Orchestrator:
        if self.ports is not None and (not self.ports or not 0 < self.ports[0] <= self.ports[-1] <= 65535):
            raise ValueError("'engine_ports' is FIRST-LAST, both in 1..65535 and the first not after the last")
        return self


class Scheduling(Strict):
    """When to leave the resident model, and for whom (docs/architecture.md, "Scheduling")."""

    max_wait: Seconds = 160.0
    """The resident model is closed when a request for another has waited this long."""
    min_residency: Seconds | None = None
    """…but not before it has been resident this long. Default: three times its measured swap time."""
    linger: Seconds = 2.0
    """An idle resident model is left for another after this long (at once after `min_residency`)."""
    drain_timeout: Seconds = 300.0
    """How long running requests may hold up a swap."""
    on_drain_timeout: Literal["wait", "abort"] = "wait"
    """Past `drain_timeout`: wait on, or end what runs with a retryable error."""
    queue_requests: Annotated[int, Field(ge=1)] = 1000
    """Waiting requests in all; one more is answered 503 with Retry-After."""
    queue_bytes: Bytes = ByteSize(1024 * 1024 * 1024)
    """Bytes of waiting request bodies in all."""
    queue_timeout: Seconds = 590.0
    """A request that has waited this long is answered 504 (OpenAI's clients give up after 600 s)."""
    priority_boost: Seconds = 30.0
    """A step of priority counts as this much waiting."""


class Device(Strict):
    """The one device that models take turns on."""

    kind: Literal["auto", "nvml", "amdgpu", "slot", "simulated"] = "auto"
    """`auto`: NVML where it answers, else an AMD GPU with memory of its own, else one slot without memory readings.

    `amdgpu` takes an APU, too.
    """
    index: Annotated[int, Field(ge=0)] = 0
    """Which GPU, in the order of PCI addresses; GPUs of other vendors don't count."""
    ledger: Location | None = None
    """`simulated`: the ledger file that simulated engines share."""
    release_timeout: Seconds = 30.0
    """How long freed memory may take to appear as free."""
    on_release_timeout: Literal["strict", "warn"] = "strict"
    """Then: refuse with the holders' names and keep watching, or go on with a warning."""
    host_memory: Bytes | None = None
    """Host memory that sleeping models and standbys may take. Default: a safe part of what is available; 0 = none."""
    read_ahead: Bytes = ByteSize(1024 * 1024 * 1024)
    """While a model waits for the device, its weights are read into the page cache: bytes per second; 0 = never."""

    @model_validator(mode="after")
    def _ledger_goes_with_simulated(self) -> Device:
        if (self.kind == "simulated") != (self.ledger is not None):
            raise ValueError("'ledger' goes with kind: simulated, and that needs it")
        return self


class Docker(Strict):
    """The Docker Engine that hosts the models with a `container`, a `compose_service` or an `image`."""

    host: str | None = None
    """Its address, `unix:///path` or `tcp://host:port`. Default: `$DOCKER_HOST`, else `unix:///var/run/docker.sock`."""
    project: str | None = None
    """The compose project of `compose_service`. Default: our own, else the only one that has such a service."""
    network: str | None = None
    """The network on which we and the engines meet. Default: our own container's; on the host: loopback ports."""
    hf_cache: str | None = None
    """Folder or volume mounted as Hugging Face cache into `image` containers. Default: our own `$HF_HOME`."""
    compile_cache: Cache = "modelswap-compile-cache"
    """Folder or volume mounted into `image` containers of vLLM and SGLang for what they compile; `false`: none.

    A model's own `env` (`VLLM_CACHE_ROOT`, …) and `volumes` go first. Images that don't run as root get none.
    """


class Config(Strict):
    """The whole file."""

    models: dict[str, Model]
    gateway: Gateway = Gateway()
    orchestrator: Orchestrator = Orchestrator()
    scheduling: Scheduling = Scheduling()
    device: Device = Device()
    docker: Docker = Docker()
