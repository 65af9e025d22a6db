"""`LLM`: generate text from Python, with the processes of a deployment behind it.

from launch import LLM, SamplingParams

with LLM("configs/smollm2-135m-tp2-cpu.yaml") as llm:
    for output in llm.generate(["Hello, my name is"], SamplingParams(temperature=0.0, max_tokens=32)):
        print(output.outputs[0].text)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from launch.checkpoint_tokenizer import open_tokenizer
from launch.config_file import load_config
from launch.deployment import Deployment
from launch.program_end import PutOffEnd
from launch.progress import GenerationProgress
from tprt.config import Config
from tprt.errors import EngineDeadError, InvalidRequestError
from tprt.messages import SamplingParams
from tprt.server.completion import Completion, FinishName, TokenLogprobs
from tprt.server.routed_client import RoutedClient
from tprt.server.sampling_defaults import read_sampling_defaults
from tprt.server.tokenizer import Message, Tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """What was generated for one prompt; `token_ids` include the end-of-sequence token, `text` does not."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishName
    logprobs: list[TokenLogprobs] | None


@dataclass(frozen=True, slots=True)
class GenerationOutput:
    """A prompt with its outputs, of which there is one.

    `prompt_logprobs`, where they were asked for, has an entry for each token of the prompt; the first is None.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    prompt_logprobs: list[TokenLogprobs | None] | None


class LLM:
    """A model on this host's devices. Close it, or use it as a context manager, to end its processes."""

    def __init__(self, config: Config | str | Path, overrides: Sequence[str] = ()) -> None:
        """Start the deployment and wait until it is ready.

        Args:
            config: a configuration, or the path of its YAML file.
            overrides: `section.key=value`, for a YAML file.

        Raises:
            ConfigError, CheckpointError, ShardPlanError: the settings or the checkpoint are wrong.
            EngineDeadError: a process failed while starting.
        """
        if not isinstance(config, Config):
            config = load_config(str(config), overrides)
        self.config = config
        self._default_sampling = SamplingParams(**asdict(read_sampling_defaults(config.model)))
        self.tokenizer = open_tokenizer(config.model.path)
        self._deployment = Deployment(config)
        self._client: RoutedClient | None = None
        try:
            self._deployment.start()
            self._client = self._deployment.connect(self.tokenizer)
            self.ready = self._deployment.wait_until_ready(self._client)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name: `coordinator`, `rank 0`; with several replicas `replica 1 rank 0`."""
        return self._deployment.pids

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[GenerationOutput]:
        """Generate from each prompt (text, or token ids) and return the outputs in the order of the prompts.

        Args:
            prompts: one prompt or several.
            sampling_params: one for all, or one for each prompt; none: what the checkpoint recommends.
            use_tqdm: show a progress bar on standard error when that is a terminal.

        Raises:
            InvalidRequestError: a prompt cannot be served; says which.
            EngineDeadError: a process failed.
        """
        several = _as_list(prompts)
        wanted = self._default_sampling if sampling_params is None else sampling_params
        params = _one_for_each(wanted, len(several))
        texts = [prompt if isinstance(prompt, str) else None for prompt in several]
        ids = [self._encode(prompt) for prompt in several]
        completions = self.run(ids, params, use_tqdm, raise_if_refused)
        return [_output(text, completion) for text, completion in zip(texts, completions, strict=True)]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[GenerationOutput]:
        """Generate the assistant's answer to one conversation, or to each of several; see `generate`."""
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [self.encode_chat(conversation) for conversation in conversations]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, use_tqdm)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation that is ready for the assistant's answer."""
        return self._need_tokenizer().encode_chat(messages)

    def run(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        show_progress: bool = False,
        on_finished: Callable[[int, Completion], None] = lambda index, completion: None,
    ) -> list[Completion]:
        """Generate from token ids; `on_finished` is called for each prompt, in order, once it has ended.

        A prompt that cannot be served ends with `Completion.error` and leaves the others alone. When
        `on_finished` raises, what still runs is given up. On Ctrl-C or SIGTERM what still runs ends with what
        it has, as `abort`, and only then the program goes the way of that signal; a second one acts at once.

        Raises:
            EngineDeadError: a process failed.
        """
        assert self._client is not None
        added = [self._add(ids, sampling) for ids, sampling in zip(prompts, params, strict=True)]
        completions = [completion for _, completion in added]
        reported = 0
        with PutOffEnd() as end:
            try:
                with GenerationProgress(completions, show_progress) as progress:
                    while reported < len(completions) and not end.is_asked:
                        if completions[reported].finished:
                            on_finished(reported, completions[reported])
                            reported += 1
                            continue
                        self._deployment.poll(self._client)
                        progress.update()
            finally:
                for request_id, _ in added:
                    if request_id is not None:
                        self._client.abort(request_id)
            for index in range(reported, len(completions)):
                on_finished(index, completions[index])
            if end.is_asked:
                self._deployment.explain_signal()
            end.catch_up()
        return completions

    def close(self) -> None:
        """End all processes; idempotent."""
        client, self._client = self._client, None
        try:
            if client is not None:
                if not self._deployment.has_failed:
                    self._deployment.expect_end()
                    client.shut_down("the client has closed")
                # There is nobody to send to where processes have failed.
                client.close(flush=not self._deployment.has_failed)
        finally:
            self._deployment.stop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, ids: list[int], sampling: SamplingParams) -> tuple[int | None, Completion]:
        """Send a request; one that cannot be sent has no id, and its completion says why."""
        assert self._client is not None
        try:
            return self._client.add(ids, sampling)
        except InvalidRequestError as error:
            return None, Completion(ids, sampling, error=str(error))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`."""
        return self._need_tokenizer().encode(text)

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequestError(
                f"{self.config.model.path} has no tokenizer.json; give prompts as token ids"
            )
        return self.tokenizer


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_for_each(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequestError(
            f"{len(params)} sampling_params for {count} prompts; give one, or one for each"
        )
    return list(params)


def raise_if_refused(index: int, completion: Completion) -> None:
    """Raise the error with which a prompt has ended, if it has; for `LLM.run`.

    Raises:
        InvalidRequestError: it cannot be served.
        EngineDeadError: it was lost.
    """
    if completion.error is not None and completion.was_lost:
        raise EngineDeadError(f"prompt {index + 1}: {completion.error}")
    if completion.error is not None:
        raise InvalidRequestError(f"prompt {index + 1}: {completion.error}")


def _output(prompt: str | None, completion: Completion) -> GenerationOutput:
    assert completion.finish_reason is not None
    output = CompletionOutput(
        index=0,
        text=completion.text,
        token_ids=completion.token_ids,
        finish_reason=completion.finish_reason,
        logprobs=completion.logprobs if completion.sampling.logprobs is not None else None,
    )
    wants_prompt = completion.sampling.prompt_logprobs is not None
    return GenerationOutput(
        prompt=prompt,
        prompt_token_ids=completion.prompt_token_ids,
        outputs=[output],
        num_cached_tokens=completion.num_cached_tokens,
        prompt_logprobs=[None, *completion.prompt_logprobs] if wants_prompt else None,
    )
