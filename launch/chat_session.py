"""One conversation with a running deployment: its messages so far, and the answer to the next one.

Knows nothing of where a message comes from and how an answer is shown.
"""

from __future__ import annotations

from collections.abc import Callable

from launch.deployment import Deployment
from launch.program_end import PutOffEnd
from tprt.errors import InvalidRequestError
from tprt.messages import EngineReady, SamplingParams
from tprt.server.completion import Completion
from tprt.server.routed_client import RoutedClient
from tprt.server.tokenizer import Tokenizer


class ChatSession:
    """A conversation that grows with every answer."""

    def __init__(
        self, deployment: Deployment, client: RoutedClient, tokenizer: Tokenizer, sampling: SamplingParams
    ) -> None:
        """Begin with no message; `deployment` is ready."""
        assert deployment.ready is not None
        self._deployment = deployment
        self._client = client
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._system = ""
        self._messages: list[dict[str, str]] = []
        self.max_tokens = _context_tokens(deployment.ready)

    def clear(self) -> None:
        """Forget all messages but the system's."""
        self._messages.clear()

    def set_system(self, text: str) -> None:
        """Put `text` before the conversation from now on; nothing if it is empty."""
        self._system = text

    def answer(self, text: str, show: Callable[[str], None]) -> str:
        """Send the user's message `text`; `show` gets the answer as it comes.

        Ctrl-C ends the answer, which the conversation keeps as far as it came; other signals that end the
        program do so once what has come was shown.

        Returns:
            Why the answer is not whole; empty if it is.

        Raises:
            InvalidRequestError: it cannot be answered, and the conversation is as before.
            EngineDeadError: a process failed.
        """
        user = {"role": "user", "content": text}
        system = [{"role": "system", "content": self._system}] if self._system else []
        prompt = self._tokenizer.encode_chat([*system, *self._messages, user])
        if len(prompt) >= self.max_tokens:
            raise InvalidRequestError(
                f"with this message the conversation has {len(prompt)} tokens, and the context holds"
                f" {self.max_tokens}; /clear forgets what was said, a larger model.max_model_len holds more"
            )
        completion, is_stopped = self._generate(prompt, show)
        if completion.error is not None:
            raise InvalidRequestError(completion.error)
        self._messages += [user, {"role": "assistant", "content": completion.text}]
        return "stopped" if is_stopped else self._why_cut(completion)

    def _generate(self, prompt: list[int], show: Callable[[str], None]) -> tuple[Completion, bool]:
        """Return the answer, and whether Ctrl-C has ended it."""
        with PutOffEnd() as end:
            request_id, completion = self._client.add(prompt, self._sampling)
            try:
                while not completion.finished and not end.is_asked:
                    self._deployment.poll(self._client)
                    show(completion.take_text())
            finally:
                self._client.abort(request_id)
            show(completion.take_text())
            try:
                end.catch_up()
            except KeyboardInterrupt:
                return completion, True
        return completion, False

    def _why_cut(self, completion: Completion) -> str:
        if completion.finish_reason != "length":
            return ""
        if len(completion.token_ids) < self._sampling.max_tokens:
            return f"cut here: the context of {self.max_tokens} tokens is full; /clear forgets what was said"
        return f"cut here, after {self._sampling.max_tokens} tokens; --max-tokens allows more"


def _context_tokens(ready: EngineReady) -> int:
    """Return the most tokens of a sequence; the KV of its last one needs no place."""
    return min(ready.max_model_len, ready.num_blocks * ready.block_size + 1)
