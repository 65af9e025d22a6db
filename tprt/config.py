"""The settings of one deployment: frozen models, one section each, that refuse unknown keys.

From these fields follow the YAML keys, `--set section.key=value`, the JSON schema and the reference page.
Knows nothing of YAML, the command line or the environment.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from tprt.config_section import PositiveFloat, PositiveInt, Seconds, Section
from tprt.server_config import ServerConfig as ServerConfig


def _word_or_list(value: object) -> str:
    """Say which of the two a value means to be, so that what is wrong with it is said once."""
    return "word" if isinstance(value, str) else "list"


RankWeights = Annotated[
    Annotated[tuple[PositiveFloat, ...], Tag("list")] | Annotated[Literal["auto"], Tag("word")],
    Discriminator(_word_or_list),
]


class ModelConfig(Section):
    """Which checkpoint, and how it is read."""

    path: str
    """Folder with config.json, *.safetensors and the tokenizer; relative to the working directory."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and KV blocks; auto takes the checkpoint's, and float32 on a CPU."""
    max_model_len: PositiveInt | None = None
    """Most tokens of one sequence, prompt and output; none: what the checkpoint allows."""
    generation_config: Literal["auto", "tprt"] = "auto"
    """auto: sampling defaults are those of the checkpoint's generation_config.json; tprt: OpenAI's."""
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    """dummy fills the weights with small random numbers: for measuring without a checkpoint's files."""


class ParallelConfig(Section):
    """How the model is spread over ranks."""

    tensor_parallel_size: PositiveInt = 1
    """Number of ranks, each a process with one device."""
    data_parallel_size: PositiveInt = 1
    """Replicas of the model on this host, tensor_parallel_size ranks each, behind one endpoint."""
    rank_weights: RankWeights | None = None
    """Share of each rank, in any unit (GiB of its GPU, say); auto: memory of its GPU; none: equal shares."""
    all_reduce: Literal["auto", "shm", "gloo", "nccl", "symm_mem"] = "auto"
    """How ranks sum: auto takes symm_mem on GPUs that are linked or shared, nccl on others, shm on CPUs."""
    allow_shared_gpu: bool = False
    """Let ranks share GPUs where there are more ranks than GPUs: for tests, with CUDA's MPS daemon running."""

    @model_validator(mode="after")
    def _one_weight_for_each_rank(self) -> ParallelConfig:
        weights = self.rank_weights
        if isinstance(weights, tuple) and len(weights) != self.tensor_parallel_size:
            raise ValueError(
                f"rank_weights has {len(weights)} entries for tensor_parallel_size {self.tensor_parallel_size};"
                " give one weight for each rank"
            )
        return self

    @model_validator(mode="after")
    def _replicas_have_devices_of_their_own(self) -> ParallelConfig:
        if self.data_parallel_size > 1 and self.allow_shared_gpu:
            raise ValueError(
                f"allow_shared_gpu with data_parallel_size {self.data_parallel_size}: each replica has devices"
                " of its own; leave one of the two out"
            )
        return self


class CacheConfig(Section):
    """The KV blocks."""

    block_size: PositiveInt = 16
    """Tokens of one KV block."""
    num_blocks: PositiveInt | None = None
    """KV blocks of every rank; none: as many as memory_fraction of the device's memory holds."""
    memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that weights, workspace and KV blocks may take together."""
    cpu_memory_gib: PositiveFloat = 1.0
    """Memory for the KV blocks of one CPU rank, in GiB, where num_blocks is not given."""
    enable_prefix_caching: bool = True
    """Keep the KV blocks of finished prompts and share equal prefixes."""


class SchedulerConfig(Section):
    """What one step may hold."""

    max_num_seqs: PositiveInt = 256
    """Most sequences that run at a time."""
    max_num_batched_tokens: PositiveInt = 8192
    """Most tokens of one step; longer prompts are computed in chunks."""
    async_scheduling: bool = True
    """Schedule and send a step before the tokens of the last are back; the output is the same."""

    @model_validator(mode="after")
    def _every_decode_fits_a_step(self) -> SchedulerConfig:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs"
                f" {self.max_num_seqs}; a step must hold one token of every running sequence"
            )
        return self


class RuntimeConfig(Section):
    """What the workers compute with."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA devices where there are any."""
    attention_backend: Literal["auto", "flash_attn_3", "flash_attn", "triton", "sdpa"] = "auto"
    """Attention kernels; auto takes the first of these that works on the device, and sdpa on a CPU."""
    enforce_eager: bool = False
    """Launch kernels one by one, never from a captured CUDA graph."""
    num_threads: PositiveInt | None = None
    """CPU threads of each rank; none: the machine's cores divided by the ranks on it."""


class SupervisionConfig(Section):
    """Deadlines, in seconds (nothing waits without one), and what happens when ranks fail."""

    startup_timeout_s: Seconds = 600.0
    """From the spawn of the ranks until all of them are ready."""
    step_timeout_s: Seconds = 300.0
    """For one step of the model; a rank that takes longer has failed."""
    stall_timeout_s: Seconds = 30.0
    """Ranks that show no progress for this long within a step are stuck, and their group has failed."""
    shutdown_grace_s: Seconds = 5.0
    """Between asking a process to exit and killing it."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often failed ranks are replaced within restart_window_s before the engine gives up; 0: never."""
    restart_window_s: PositiveFloat = 600.0
    """The time within which restarts are counted."""


class HostsConfig(Section):
    """How a deployment is spread over hosts; one that is on one host needs none of it."""

    nnodes: PositiveInt = 1
    """Number of hosts."""
    node_rank: Annotated[int, Field(ge=0)] = 0
    """Which of them this is; that of node rank 0 runs coordinator and server, and has rank 0."""
    nproc_per_node: tuple[PositiveInt, ...] | None = None
    """Ranks of each host, in the order of node ranks; none: all have equally many."""
    rdzv_endpoint: str | None = None
    """host:port, an address of the host of node rank 0 that the others can reach; it listens there."""
    rdzv_id: str = "tprt"
    """Name of the deployment; hosts of another one are refused."""
    secret_file: str | None = None
    """File with the secret that all hosts share, 16 characters or more; none: it is in $TPRT_HOSTS_SECRET."""
    interface: str | None = None
    """Network interface for what goes between ranks; none: that of this host's end of rdzv_endpoint."""
    join_timeout_s: Seconds = 300.0
    """For all hosts to come, at the start and again after one was lost."""
    heartbeat_timeout_s: Seconds = 5.0
    """A host of which nothing is heard for so long is lost."""

    @model_validator(mode="after")
    def _hosts_can_find_each_other(self) -> HostsConfig:
        if self.node_rank >= self.nnodes:
            raise ValueError(
                f"node_rank is {self.node_rank} and nnodes {self.nnodes}; expected 0 to {self.nnodes - 1}"
            )
        if self.nnodes > 1 and self.rdzv_endpoint is None:
            raise ValueError(f"nnodes is {self.nnodes} without rdzv_endpoint; give host:port of node rank 0")
        if self.rdzv_endpoint is not None:
            split_endpoint(self.rdzv_endpoint)
        if self.nproc_per_node is not None and len(self.nproc_per_node) != self.nnodes:
            raise ValueError(
                f"nproc_per_node has {len(self.nproc_per_node)} entries and nnodes is {self.nnodes}; give the"
                " ranks of each host"
            )
        return self


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Return host and port of `host:port`; brackets around an IPv6 address are taken off.

    Raises:
        ValueError: it is not of that form.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{endpoint!r} is no endpoint; expected host:port, as in 10.0.0.1:29400")
    return host.removeprefix("[").removesuffix("]"), int(port)


class LoggingConfig(Section):
    """What is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is written."""
    format: Literal["text", "json"] = "text"
    """text for people, one JSON object per line for programs."""
    dir: str | None = None
    """Folder where each process also has a log file of its own (rank-0.log, coordinator.log); none: nowhere."""
    local_ranks_filter: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Ranks, by number on their host, whose log is shown; none: all. The others' go to logging.dir alone."""


class Config(Section):
    """One deployment."""

    model: ModelConfig
    """Which checkpoint, and how it is read."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model is spread over ranks."""
    cache: CacheConfig = CacheConfig()
    """The KV blocks."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """What one step may hold."""
    runtime: RuntimeConfig = RuntimeConfig()
    """What the workers compute with."""
    server: ServerConfig = ServerConfig()
    """Where the HTTP server of `tprt serve` listens, who may ask, and how much."""
    supervision: SupervisionConfig = SupervisionConfig()
    """Deadlines, in seconds (nothing waits without one), and what happens when ranks fail."""
    hosts: HostsConfig = HostsConfig()
    """How a deployment is spread over hosts; one that is on one host needs none of it."""
    logging: LoggingConfig = LoggingConfig()
    """What is written to standard error."""

    @model_validator(mode="after")
    def _ranks_fit_the_hosts(self) -> Config:
        hosts, parallel = self.hosts, self.parallel
        if hosts.nproc_per_node is not None and sum(hosts.nproc_per_node) != parallel.tensor_parallel_size:
            raise ValueError(
                f"hosts.nproc_per_node {list(hosts.nproc_per_node)} is {sum(hosts.nproc_per_node)} ranks, and"
                f" parallel.tensor_parallel_size is {parallel.tensor_parallel_size}; make them equal"
            )
        if hosts.nproc_per_node is None and parallel.tensor_parallel_size % hosts.nnodes:
            raise ValueError(
                f"parallel.tensor_parallel_size {parallel.tensor_parallel_size} does not spread evenly over"
                f" hosts.nnodes {hosts.nnodes}; give hosts.nproc_per_node"
            )
        if hosts.nnodes > 1 and parallel.data_parallel_size > 1:
            raise ValueError(
                f"parallel.data_parallel_size is {parallel.data_parallel_size} and hosts.nnodes {hosts.nnodes}:"
                " replicas are on one host; give each host a deployment of its own and put a router before them"
                " (docs/serving.md, Replicas)"
            )
        if hosts.nnodes > 1 and parallel.all_reduce == "shm":
            raise ValueError("parallel.all_reduce is shm, which joins ranks of one host; use auto or gloo")
        if hosts.nnodes > 1 and parallel.rank_weights == "auto":
            raise ValueError("parallel.rank_weights is auto, which looks at one host; give one for each rank")
        return self

    def ranks_of(self, node_rank: int) -> range:
        """Return the ranks of one host."""
        size, hosts = self.parallel.tensor_parallel_size, self.hosts
        counts = hosts.nproc_per_node or (size // hosts.nnodes,) * hosts.nnodes
        first = sum(counts[:node_rank])
        return range(first, first + counts[node_rank])
