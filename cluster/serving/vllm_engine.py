"""vLLM behind the same door: its scheduler and kernels, our line, our adapter store, our text.

vLLM takes dense weights and plain LoRA. Its base is written once as a directory that transformers reads, dequantized
where the base is quantized, so that adapters fit it exactly; an adapter of any family goes in as the LoRA that it is
exactly (`lowrank.adapters.export.as_lora`), and is refused where it is none. Read against vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.config import ServeConfig
from cluster.errors import ServeError
from cluster.model import compute_dtype, end_ids, initial_adapters, starts_from_part
from cluster.serving.decoding import TokenLogprob, with_texts
from cluster.serving.holder import Files
from cluster.serving.slots import INITIAL, BusyError, Job, Line, Piece, Slot
from cluster.serving.spec import ServeSpec, base_identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lowrank.adapters.export import Exported

logger = logging.getLogger("ray.serve.rankline")

T = TypeVar("T")
_MAX_LORA_RANK = 64
_END_S = 10.0


def start(spec: ServeSpec, config: ServeConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[VllmEngine, VllmHolder]:
    """An engine over the base of `spec`, with its initial adapter where the base was split.

    Raises:
        ServeError: vLLM is not installed, or refuses the model or `serve.vllm_options`.
    """
    import torch
    from transformers import GenerationConfig

    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ServeError(
            f"serve {spec.app_name}: serve.engine is 'vllm', which cannot be imported here ({error}). Install vllm in "
            "the replicas' environment, or set serve.engine: rankline."
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = str(compute_dtype("auto", device)).removeprefix("torch.")
    base = written_base(spec, dtype)
    eos = end_ids(GenerationConfig.from_pretrained(str(base))) or [tokenizer.eos_token_id]
    options: dict[str, Any] = {"dtype": dtype, "max_lora_rank": _MAX_LORA_RANK} | dict(config.vllm_options)
    engine = VllmEngine(base, tokenizer, eos, config.max_concurrent, config.max_waiting, options)
    holder = VllmHolder(engine, int(options["max_lora_rank"]))
    if starts_from_part(spec.source):
        holder.add(INITIAL, holder.ready(Files(initial_adapters(spec.source), {})))
    return engine, holder


def written_base(spec: ServeSpec, dtype: str) -> Path:
    """The directory of the base in dense weights of `dtype`, made the first time; replicas share it."""
    import torch

    from cluster.export import export_base

    facts = json.dumps([base_identity(spec.source.base_facts), str(spec.source.shards), dtype], sort_keys=True)
    out = Path(spec.scratch_dir or tempfile.gettempdir()) / f"base-{hashlib.sha256(facts.encode()).hexdigest()[:20]}"
    if not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=out.parent, prefix=".base-"))
        try:
            export_base(spec.source, made, getattr(torch, dtype))
            with contextlib.suppress(OSError):  # another replica was first
                made.rename(out)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return out


class _Request(Slot):
    """A job whose `cancel` reaches vLLM."""

    def __init__(self, engine: VllmEngine, job: Job, emit: Callable[[Piece], None], number: int) -> None:
        super().__init__(job, emit, engine.tokenizer, number)
        self._engine = engine

    def cancel(self) -> None:
        """Give the slot up; harmless when it has ended."""
        super().cancel()
        self._engine.give_up(self)


class VllmEngine:
    """vLLM's asynchronous engine on an event loop and a thread of its own."""

    def __init__(
        self,
        base: Path,
        tokenizer: PreTrainedTokenizerBase,
        eos: Collection[int],
        max_concurrent: int,
        max_waiting: int,
        options: Mapping[str, Any],
    ) -> None:
        """Start it; as long as vLLM takes.

        Args:
            base: directory of the base model.
            tokenizer: for decoding; nobody else may use this object.
            eos: token ids that end an answer.
            max_concurrent: requests that vLLM has at a time.
            max_waiting: requests that wait before it.
            options: further arguments of `vllm.AsyncEngineArgs`.

        Raises:
            ServeError: vLLM refuses the model or the options.
        """
        self.tokenizer, self._eos = tokenizer, frozenset(eos)
        self._numbers = itertools.count()
        self.line: Line[_Request] = Line(max_concurrent, max_waiting)
        self.loras: dict[str, Any] = {}
        """Name -> vLLM's LoRARequest."""
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rankline-vllm", daemon=True)
        self._thread.start()
        own = {"model": str(base), "enable_lora": True, "max_loras": max_concurrent, "max_num_seqs": max_concurrent}
        try:
            self._llm = self.call(_made(own | dict(options)))
        except (Exception, SystemExit) as error:
            self._stop_loop()
            raise ServeError(f"serve {base.name} by vLLM: {type(error).__name__}: {error}") from error
        model = self._llm.vllm_config.model_config
        self.context, self.vocab_size = int(model.max_model_len), int(model.get_vocab_size())

    @property
    def healthy(self) -> bool:
        """Whether vLLM's processes live."""
        return self._thread.is_alive() and not self._closed and not self._llm.errored

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the engine's loop and wait for it; from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def submit_all(self, jobs: Sequence[Job], emits: Sequence[Callable[[Piece], None]]) -> list[Slot]:
        """Take in jobs, all or none; see `AnyEngine`.

        Raises:
            BusyError: as `Line.join`, or the engine is closed.
        """
        made = [_Request(self, job, emit, next(self._numbers)) for job, emit in zip(jobs, emits, strict=True)]
        if not self.healthy:
            raise BusyError("the engine is closed")
        self.line.join(made)
        self._soon(self._admit)
        return list(made)

    async def add(self, name: str, lora: Any) -> None:
        """Load a LoRARequest, and let jobs use it by `name`."""
        await self._llm.add_lora(lora)
        self.loras[name] = lora

    def drop(self, name: str, then: Callable[[], None]) -> None:
        """Forget a LoRA that no job uses; `then` is called when vLLM has."""
        lora = self.loras.pop(name)

        async def remove() -> None:
            try:
                await self._llm.remove_lora(lora.lora_int_id)
            except Exception:
                logger.warning("vLLM does not give LoRA %s back", name, exc_info=True)
            finally:
                then()

        asyncio.run_coroutine_threadsafe(remove(), self._loop)

    def give_up(self, slot: _Request) -> None:
        """End a job before its time; harmless when it has ended, from any thread."""
        self._soon(partial(self._leave, slot))

    def close(self) -> None:
        """End vLLM; live jobs end with `cancelled`."""
        self._closed = True
        for slot in self.line.everybody:
            slot.cancel()
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._drained(), self._loop).result(_END_S)
        self._llm.shutdown()
        self._stop_loop()

    def _stop_loop(self) -> None:
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_end_others(), self._loop).result(_END_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _soon(self, work: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and so is everything on it
            self._loop.call_soon_threadsafe(work)

    # ---- on the loop --------------------------------------------------------------------------------------------

    async def _drained(self) -> None:
        while self._tasks:
            await asyncio.sleep(0.01)

    def _admit(self) -> None:
        for slot in self.line.admit():
            if slot.number not in self._tasks:
                self._tasks[slot.number] = self._loop.create_task(self._answer(slot))

    def _leave(self, slot: _Request) -> None:
        task = self._tasks.get(slot.number)
        if task is None:
            self._end(slot, Piece("", slot.produced, "cancelled"))
        else:
            task.cancel()

    def _end(self, slot: _Request, piece: Piece) -> None:
        # The slot is free before the client hears of the end, so that its next request is not refused.
        there = self.line.leave(slot)
        self._tasks.pop(slot.number, None)
        if there:
            slot.send(piece)
        self._admit()

    async def _answer(self, slot: _Request) -> None:
        finish = "error"
        try:
            last = await self._written(slot)
            if last is not None:
                self._end(slot, last)
                return
        except asyncio.CancelledError:
            finish = "cancelled"
        except Exception:
            logger.exception("vLLM fails; the request is answered with an error")
        self._end(slot, Piece("", slot.produced, "cancelled" if finish == "cancelled" else "error"))

    async def _written(self, slot: _Request) -> Piece | None:
        """The last piece of an answer, all others having been sent; None where vLLM ended it before its time."""
        job = slot.job
        # A job's adapter is leased until it ends, so that its name is known.
        lora = None if job.adapter is None else self.loras[job.adapter]
        answer = self._llm.generate(
            {"prompt_token_ids": list(job.prompt)}, _sampling(job, self._eos), str(slot.number), lora_request=lora
        )
        async with contextlib.aclosing(answer) as outputs:  # leaving early aborts it in vLLM
            async for output in outputs:
                made = output.outputs[0]
                for place, token in enumerate(made.token_ids):
                    noted = None
                    if job.top_logprobs is not None and token not in self._eos:
                        noted = self._noted(made.logprobs[place], token, slot.token, job.top_logprobs)
                    piece = slot.accept(token, self._eos, noted)
                    if piece.finish is not None:
                        return piece
                    if piece.text:
                        slot.send(piece)
        return None

    def _noted(self, found: Mapping[int, Any], token: int, before: int, top: int) -> TokenLogprob:
        likeliest = sorted(found.items(), key=lambda entry: entry[1].rank)[:top]
        return with_texts(
            token, before, found[token].logprob, [(own, one.logprob) for own, one in likeliest], self.tokenizer
        )


async def _end_others() -> None:
    """Cancel what else is on this loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def _made(options: Mapping[str, Any]) -> Any:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**{"disable_log_stats": True} | dict(options)))


def _sampling(job: Job, eos: Collection[int]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=job.sampling.temperature,
        top_p=job.sampling.top_p,
        seed=job.sampling.seed,
        max_tokens=job.max_tokens,
        stop_token_ids=sorted(eos),
        logprobs=job.top_logprobs,
        detokenize=False,  # ours never cuts a character, and holds back what may begin a stop string
        output_kind=RequestOutputKind.DELTA,
    )


class VllmHolder:
    """The LoRAs of a `VllmEngine`, each a directory for as long as the engine has it: vLLM reads them when it likes."""

    def __init__(self, engine: VllmEngine, max_rank: int) -> None:
        """Args: max_rank: largest that the engine takes."""
        self._engine, self._max_rank = engine, max_rank
        self._directory = tempfile.TemporaryDirectory(prefix="rankline-loras-")
        self._numbers = itertools.count(1)

    def ready(self, files: Files) -> Exported:
        """As plain LoRA.

        Raises:
            AdapterError: the adapter is none exactly, is of too large a rank, or brings modules trained whole.
        """
        from lowrank.adapters.export import as_lora
        from lowrank.errors import AdapterError

        if files.saved:
            raise AdapterError("vLLM takes no modules that were trained whole. Set serve.engine: rankline.")
        made = as_lora(files.adapters)
        if made.rank > self._max_rank:
            raise AdapterError(
                f"as LoRA it has rank {made.rank}, and vLLM was started for {self._max_rank}. Set "
                f"serve.vllm_options.max_lora_rank: {made.rank}, or serve.engine: rankline."
            )
        return made

    def num_bytes(self, ready: Exported) -> int:
        """Of all factors."""
        return sum(tensor.nbytes for layer in ready.layers.values() for tensor in layer.parameters())

    def add(self, name: str, ready: Exported) -> None:
        """Write it down and let vLLM read it.

        Raises:
            AdapterError: vLLM refuses it.
        """
        from vllm.lora.request import LoRARequest

        from lowrank.adapters.peft_format import save_adapter
        from lowrank.config import AdapterConfig
        from lowrank.errors import AdapterError

        number = next(self._numbers)
        directory = Path(self._directory.name) / str(number)
        plain = AdapterConfig(method="lora", r=ready.rank, lora_alpha=float(ready.rank), init="kaiming")
        save_adapter(directory, ready.layers, plain, {"base": "dense"})
        try:
            self._engine.call(self._engine.add(name, LoRARequest(name, number, str(directory))))
        except Exception as error:  # vLLM hands its own through as plain ones
            shutil.rmtree(directory, ignore_errors=True)
            raise AdapterError(f"vLLM refuses it: {error}") from error

    def remove(self, name: str, keep: bool) -> None:
        """Nothing is kept: vLLM has a cache of its own."""
        del keep
        directory = self._engine.loras[name].lora_path
        self._engine.drop(name, lambda: shutil.rmtree(directory, ignore_errors=True))
