"""The back end vllm: conversations with a model that vLLM runs in this process, a whole batch at a time.

Owns the engine: one on one GPU, or on the CPU.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from builder import machine
from builder.errors import ConfigError, StageError, check_packages
from builder.models.llm.answers import Rejected
from builder.models.llm.backend import AnswerOrError, ChatEntry, PromptBackend, Workload
from builder.models.llm.conversation import Answer, Conversation, Messages
from builder.models.llm.http import AskFailed

#: The engine runs in the worker's own process, so that a killed worker leaves none behind. No usage is reported.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
#: Rows of a batch. vLLM forms batches by itself, the better the more rows it has.
IN_PROCESS_ROWS = 4096
#: What a model's own configuration may say about sampling.
_SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def check_installed() -> None:
    """Raises StageError if vllm is not installed; loads nothing."""
    check_packages("vllm", extra="vllm", needed_by="backend 'vllm'")


class VllmChat(PromptBackend):
    """An engine with its model.

    Args:
        model: a folder, or a hub's id.
        device: `cuda`, `cuda:1` or `cpu`.
        sampling: temperature, max_tokens, seed; None: the model's own.
        json_schema: every answer is JSON of this schema: the engine samples only tokens that fit it.
        template: further variables of the model's chat template.
        engine: further arguments of `vllm.LLM`, such as max_model_len.

    Raises:
        StageError: vLLM is not installed, there is no such device or model, or the engine does not start.
    """

    def __init__(
        self,
        model: str,
        device: str,
        *,
        sampling: Mapping[str, Any],
        json_schema: Mapping[str, Any] | None,
        template: Mapping[str, Any],
        engine: Mapping[str, Any],
    ) -> None:
        check_installed()
        if model.startswith((".", "/", "~")) and not os.path.isdir(os.path.expanduser(model)):  # noqa: PTH111, PTH112
            raise StageError(f"there is no model folder '{model}'", fix="name a folder that exists, or a hub's id")
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        _choose(device)
        import vllm
        from vllm.platforms import current_platform

        package: Any = vllm
        _check(device, current_platform.device_type)
        try:
            self._engine = package.LLM(
                model=os.path.expanduser(model),  # noqa: PTH111
                **{"enable_prefix_caching": True, **engine},
            )
        except Exception as error:
            if machine.is_of_the_machine(error):
                raise
            raise StageError(
                f"vLLM cannot start: {type(error).__name__}: {' '.join(str(error).split())[:500]}",
                where={"model": model, "device": device},
                fix="correct 'model', 'run.devices' or the keys of 'engine'; vLLM's own messages are in the log",
            ) from error
        self._model, self._template = model, dict(template)
        base = self._engine.get_default_sampling_params()
        wanted = {name: getattr(base, name) for name in _SAMPLED}
        wanted |= {name: value for name, value in sampling.items() if value is not None}
        if json_schema is not None:
            wanted["structured_outputs"] = package.sampling_params.StructuredOutputsParams(json=dict(json_schema))
        self._sampling = package.SamplingParams(**wanted)

    def submit(self, conversations: Sequence[Conversation]) -> Future[list[AnswerOrError]]:
        """As `PromptBackend.submit`; it returns when every conversation has its outcome."""
        future: Future[list[AnswerOrError]] = Future()
        future.set_result([*self.answer(conversations)])
        return future

    def answer(self, conversations: Sequence[Conversation]) -> list[Answer | AskFailed | Rejected]:
        """The outcomes of conversations, in order; rejected answers are asked for again together."""
        outcomes: dict[int, Answer | AskFailed | Rejected] = {}
        while left := [i for i in range(len(conversations)) if i not in outcomes]:
            outcomes |= {i: failed for i in left if (failed := self._too_long(conversations[i].messages)) is not None}
            if not (open_ := [i for i in left if i not in outcomes]):
                break
            replies = self._engine.chat(
                [conversations[i].messages for i in open_],
                self._sampling,
                use_tqdm=False,
                chat_template_kwargs=self._template or None,
            )
            for i, reply in zip(open_, replies, strict=True):
                outcome = self._heard(conversations[i], reply)
                if outcome is not None:
                    outcomes[i] = outcome
        return [outcomes[i] for i in range(len(conversations))]

    def _too_long(self, messages: Messages) -> AskFailed | None:
        """Why a request is not asked: the engine refuses a whole batch if one request is longer than the model takes.

        Tokens are counted only where there may be too many: a token of text has at least one byte, the frame of the
        chat template has some hundred tokens.
        """
        longest: int = self._engine.model_config.max_model_len
        if 2 * sum(len(message["content"].encode()) for message in messages) < longest:
            return None
        tokenizer = self._engine.get_tokenizer()
        tokens = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, add_generation_prompt=True, **self._template
        )
        if len(tokens) < longest:
            return None
        message = f"the request has {len(tokens)} tokens, and the model takes {longest} with the answer's"
        return AskFailed("rejected", message, is_final=True)

    def _heard(self, conversation: Conversation, reply: Any) -> Answer | AskFailed | Rejected | None:
        output = reply.outputs[0]
        if output.finish_reason == "length":
            return AskFailed("bad_reply", "the answer is cut: 'max_tokens' is too small", is_final=True)
        try:
            accepted = conversation.hear(output.text)
        except Rejected as rejected:
            return rejected
        if accepted is None:
            return None
        tokens = len(reply.prompt_token_ids), len(output.token_ids)
        return Answer(accepted.prompt, accepted.lang, self._model, None, *tokens, None)

    def close(self) -> None:
        """Frees the model's memory."""
        del self._engine
        gc.collect()
        with contextlib.suppress(ImportError):
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _choose(device: str) -> None:
    """Lets vLLM see only one GPU; call it before vLLM is imported.

    Raises:
        StageError: there is no such GPU.
    """
    if device == "cpu":
        return
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number or "0").isdigit():
        raise StageError(f"vLLM cannot run on device '{device}'", fix='use "cuda:0", "cuda:1" ... or "cpu"')
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else None
    if names is not None and int(number or 0) >= len(names):
        raise StageError(
            f"there is no device '{device}'", where={"CUDA_VISIBLE_DEVICES": visible}, fix="name fewer run.devices"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = (number or "0") if names is None else names[int(number or 0)]


def _check(device: str, have: str) -> None:
    """Refuses a device that this build of vLLM does not run on: it would use another one."""
    wanted = device.partition(":")[0]
    if wanted != have:
        fix = f'set devices = ["{have or "cpu"}"]; for GPUs, install a vLLM and a driver for CUDA'
        if have == "cuda":
            fix = 'set one GPU per worker: devices = ["cuda:0", "cuda:1"]'
        raise StageError(
            f"vLLM runs on '{have}' here, not on '{device}'",
            fix=fix,
        )


def _workload(options: Any) -> Workload:
    if options.model is None:
        raise ConfigError("backend 'vllm' has no model", fix='name it: model = "models/my-model", or a hub\'s id')
    return Workload(batch_rows=IN_PROCESS_ROWS, gpus=1)


def _make(options: Any, workers: int, device: str) -> VllmChat:
    return VllmChat(
        options.model,
        device,
        sampling={"temperature": options.temperature, "max_tokens": options.max_tokens, "seed": options.seed},
        json_schema=options.json_schema,
        template=options.body.get("chat_template_kwargs", {}),
        engine=options.engine,
    )


def _check_packages(options: Any) -> None:
    check_installed()


ENTRY = ChatEntry(_workload, _make, _check_packages)
