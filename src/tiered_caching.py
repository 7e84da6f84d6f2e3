"""The manager: after every generation, decide how long the KV cache lives and where.

Also here: storage backends for values of any kind, behind one interface (`BaseBackend`). Every
backend keeps a pickled copy, so a stored value does not change with the caller's object, and all
of them refuse the same keys, values and ttls. What others could have written (disk, Redis) is
unpickled only after its HMAC-SHA256 signature was checked: unpickling forged bytes would run the
forger's code.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import redis
from cachetools import TLRUCache

from caching_heuristics import HeuristicConfig
from kvttl.background import check_whole
from kvttl.decisions.keeper import RecordKeeper
from kvttl.decisions.log import DecisionLog, DecisionRecord
from kvttl.decisions.metrics import DecisionMetrics
from kvttl.lmcache.layout import BaseController
from kvttl.lmcache.requests import RequestCheck
from kvttl.manager.decider import Decider
from kvttl.manager.engine_calls import EngineDied as EngineDied  # for callers, to catch
from kvttl.manager.generation import Engine, ManagedOutput, is_one_prompt, one_each, text_of
from kvttl.manager.metadata import RequestMetadata
from kvttl.manager.policy import Policy, who_decides
from kvttl.manager.settling import under
from kvttl.storage import redis_client, sealed
from kvttl.storage.probes import reason_of
from kvttl.storage.sealed import Record, check_seconds, dump, key_bytes, sha256


class BaseBackend(ABC):
    """The contract of every tier's storage; safe to share between threads.

    ``tier`` names the tier that a backend serves: ``"gpu"``, ``"disk"`` or ``"remote"``.
    """

    tier: str

    @abstractmethod
    def get(self, key: str) -> Any:
        """Return a copy of the value of ``key``, or None where it is absent or has expired."""

    @abstractmethod
    def set(self, key: str, value: Any, ttl: float) -> None:
        """Keep a copy of ``value`` for ``ttl`` seconds, in place of value and ttl of before.

        Parameters
        ----------
        key : str
            Any non-empty text.
        value : object
            Anything picklable but None.
        ttl : float
            Seconds, > 0 and finite.

        Raises
        ------
        TypeError, ValueError
            Names the field, the value and what is allowed; the value of before stays.
        """

    @abstractmethod
    def delete(self, key: str) -> bool:
        """Forget ``key`` and return whether it was there."""

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def close(self) -> None:
        """Let go of connections; what is stored stays."""


class _RecordBackend(BaseBackend):
    """Finds pickled records: what only asks for existence need not unpickle them."""

    def get(self, key: str) -> Any:
        record = self._find(key)
        return None if record is None else sealed.load(record.payload)

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    @abstractmethod
    def _find(self, key: str) -> Record | None:
        """Return the record of a key that has not expired."""


class InMemoryBackend(_RecordBackend):
    """Hot tier: pickled copies in this process; when full, the least recently used go.

    Parameters
    ----------
    max_bytes : int
        Bound on the pickled values, in bytes; an entry costs about 0.5 kB on top.
        A value over the bound is a ValueError.
    timer : callable
        Clock in seconds.

    Examples
    --------
    >>> hot = InMemoryBackend()
    >>> hot.set("chunk", [1, 2], ttl=60)
    >>> hot.get("chunk"), hot.delete("chunk"), hot.get("chunk")
    ([1, 2], True, None)
    """

    tier = "gpu"

    def __init__(self, max_bytes: int = 256 * 2**20, timer: Callable[[], float] = time.monotonic):
        self._cache = TLRUCache(
            check_whole("max_bytes", max_bytes),
            ttu=lambda _name, record, _now: record.expires_at_s,
            timer=timer,
            getsizeof=lambda record: len(record.payload),
        )
        self._lock = threading.Lock()

    def _find(self, key: str) -> Record | None:
        name = key_bytes(key)
        with self._lock:
            return self._cache.get(name)

    def set(self, key: str, value: Any, ttl: float) -> None:
        name, payload, ttl_s = key_bytes(key), dump(value), check_seconds("ttl", ttl)
        if len(payload) > self._cache.maxsize:
            limit = f"at most max_bytes={self._cache.maxsize} bytes"
            raise ValueError(f"value must be {limit} when pickled, got {len(payload)}")
        with self._lock:
            self._cache[name] = Record(self._cache.timer() + ttl_s, payload)

    def delete(self, key: str) -> bool:
        name = key_bytes(key)
        with self._lock:
            return self._cache.pop(name, None) is not None


class LocalDiskBackend(_RecordBackend):
    """Warm tier: one signed file per key, named after the key's SHA-256; survives a restart.

    See `SealedFolder`.

    Parameters
    ----------
    path : str or Path
        Folder; made with mode 0700 where it is missing. Processes may share it.
    secret : bytes, optional
        Signs the files, 16 bytes or more. By default the folder's ``.hmac_key``, made at random.
    timer : callable
        Clock in seconds, the same for all that share the folder.

    Raises
    ------
    PermissionError
        Where others could have read or written ``.hmac_key``.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> LocalDiskBackend(folder.name).set("chunk", [1, 2], ttl=60)
    >>> LocalDiskBackend(folder.name).get("chunk")
    [1, 2]
    >>> folder.cleanup()
    """

    tier = "disk"

    def __init__(
        self,
        path: str | os.PathLike[str] = "./cache_warm/",
        secret: bytes | None = None,
        timer: Callable[[], float] = time.time,
    ):
        self._folder = sealed.SealedFolder(path, secret, self.tier, timer)
        self.purge()

    def _find(self, key: str) -> Record | None:
        return self._folder.read(sha256(key_bytes(key)))

    def set(self, key: str, value: Any, ttl: float) -> None:
        name, payload, ttl_s = sha256(key_bytes(key)), dump(value), check_seconds("ttl", ttl)
        self._folder.write(name, payload, ttl_s)

    def delete(self, key: str) -> bool:
        return self._folder.delete(sha256(key_bytes(key)))

    def purge(self) -> int:
        """Remove expired entries, and what crashes left behind; return how many entries went."""
        return self._folder.purge()


class RemoteBackend(_RecordBackend):
    """Cold tier: signed values in Redis, which expires them itself.

    Parameters
    ----------
    url : str, optional
        ``redis://[user:password@]host:port/db``, or ``rediss://`` for TLS. Without it and
        ``client``: a private fakeredis in this process.
    key_prefix : str
        Stands before every key in Redis.
    secret : bytes, optional
        Signs the values, 16 bytes or more; all who share data must share it. By default random:
        then only this instance can read what it has written.
    client : redis.Redis, optional
        Used as it is instead of ``url``, and left open by ``close()``.
    timeout_s : float
        Longest wait in seconds for a connection, and for an answer.
    limits : RedisLimits, optional
        All limits, in place of ``timeout_s``: ``load_config().redis_limits`` is config.yaml's.
    **options
        Passed on to ``redis.Redis.from_url``, such as ``ssl_ca_certs``.

    Raises
    ------
    ValueError
        Where an argument cannot be used.
    ConnectionError
        From get, set and delete where Redis fails; names its address without the password.

    Examples
    --------
    >>> cold = RemoteBackend()
    >>> cold.set("chunk", [1, 2], ttl=0.5)
    >>> cold.get("chunk")
    [1, 2]
    """

    tier = "remote"

    def __init__(
        self,
        url: str | None = None,
        key_prefix: str = "kvttl:",
        secret: bytes | None = None,
        client: redis.Redis | None = None,
        timeout_s: float = redis_client.DEFAULT_LIMITS.timeout_s,
        limits: redis_client.RedisLimits | None = None,
        **options: Any,
    ):
        if client is not None and url is not None or options and url is None:
            raise ValueError("give a url (options only with it) or a client, not both")
        timeout_s = check_seconds("timeout_s", timeout_s)
        self._prefix = key_prefix.encode()
        self._signer = sealed.Signer(secret, self.tier)
        self._owns_client = client is None
        limits = limits or redis_client.RedisLimits(timeout_s, timeout_s)
        self._client = redis_client.connect(url, limits, **options) if client is None else client
        if self._client.get_encoder().decode_responses:
            raise ValueError("decode_responses must be off: the values are bytes")
        self.address = redis_client.address_of(self._client)

    def _find(self, key: str) -> Record | None:
        redis_key = self._redis_key(key)
        with self._calling():
            record = self._client.get(redis_key)
        return None if record is None else self._signer.open(sha256(redis_key), record)

    def set(self, key: str, value: Any, ttl: float) -> None:
        redis_key, payload, ttl_s = self._redis_key(key), dump(value), check_seconds("ttl", ttl)
        # Rounded up: 0 ms would be refused.
        ttl_ms = math.ceil(min(ttl_s * 1000, redis_client.MAX_REDIS_TTL_MS))
        with self._calling():
            self._client.set(redis_key, self._signer.seal(sha256(redis_key), payload), px=ttl_ms)

    def delete(self, key: str) -> bool:
        redis_key = self._redis_key(key)
        with self._calling():
            return bool(self._client.delete(redis_key))

    def close(self) -> None:
        if self._owns_client:
            self._client.close()

    def _redis_key(self, key: str) -> bytes:
        return self._prefix + key_bytes(key)

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, OSError) as error:
            reason = reason_of(error, self._client)
            raise ConnectionError(f"Redis at {self.address} failed: {reason}") from error


class MultiTierCache(contextlib.AbstractContextManager):
    """Generates text, and places the prompt's KV cache by the heuristics afterwards.

    Parameters
    ----------
    lmcache_controller : BaseController
        Says where KV is, and moves it. One manager for one LMCache server: another
        process's is an AlreadyManaged error, an earlier one of this process stops managing.
    llm : vllm.LLM, optional
        The engine; `set_llm` gives it later.
    config : Policy, optional
        Makes the two decisions, and knows the expiry ladder; `HeuristicConfig()` by default.
        Settings that the sliders have saved: ``config=kvttl.settings.load_settings()``.
    policy : str or CachePolicy
        ``"formula"``: `config` decides. ``"adaptive"``, ``"recency"``, ``"fixed"``, or an object
        that is a `kvttl.policies.CachePolicy`: it decides as it goes, TTLs are renewed by what it
        says later, and what fails there is decided by `config`. Beside a `log` it is saved, and
        goes on after a restart.
    costs : kvttl.replay.costs.TierCosts, optional
        What ``"adaptive"`` values chunks and tiers by; without: hits.
    notify : callable, optional
        Gets one line about each decision; None = silence.
    clock : callable
        Unix time in seconds, for deadlines and records.
    max_records : int
        Records kept in memory, 64 MiB at most; the oldest go first.
    keep_prompts : bool
        Show the prompts' text in records.
    background : bool
        Decide and move on worker threads; `generate_and_manage` returns at once.
    workers : int
        Decisions that are made at the same time in the background.
    max_queue, max_queue_bytes : int
        Decisions that may wait for a worker, and what their token ids may take; beyond
        either the oldest is given up.
    sweep_every_s : float, optional
        How often expired claims are taken down the ladder; None = only by `sweep`.
    perplexity_source : str
        Where a perplexity comes from that the caller does not give: ``"generation"``
        (the engine's log-probabilities of the answer, no extra pass), ``"prompt"``
        (`scorer`, once a new prompt) or ``"off"``.
    scorer : callable, optional
        Token ids -> perplexity, such as `kvttl.session.demo_model.prompt_perplexity`. It never
        touches the engine.
    log : DecisionLog, optional
        Every record is appended; `recover` reads them after a restart.
    metrics : DecisionMetrics, optional
        Counts every record.
    meter : kvttl.meter.live.RegretMeter, optional
        Says, in `metrics`, what other policies would have hit.

    Notes
    -----
    Nothing on the way to a decision can break a generation: a failure becomes
    a record with its reason, and the text is returned. Any thread may call any method;
    generations of several threads wait for each other, decisions and sweeps do not.

    Examples
    --------
    >>> from cache_controller import LocalLMCacheController
    >>> memory = {tier: InMemoryBackend() for tier in ("gpu", "disk", "remote")}
    >>> class Echo:  # stands for vllm.LLM
    ...     def generate(self, prompt, sampling_params):
    ...         return prompt.upper()
    >>> local = LocalLMCacheController(chunk_size_tokens=4, backends=memory)
    >>> with MultiTierCache(local, Echo()) as cache:
    ...     cache.generate_and_manage("what is KV?", None, {"perplexity": 35.0})
    ✓ Moved KV from gpu to disk (TTL: 3534s)
    'WHAT IS KV?'
    """

    def __init__(
        self,
        lmcache_controller: BaseController,
        llm: Any = None,
        *,
        config: Policy | None = None,
        policy: Any = "formula",
        costs: Any = None,
        notify: Callable[[str], Any] | None = print,
        clock: Callable[[], float] = time.time,
        max_records: int = 10_000,
        keep_prompts: bool = False,
        background: bool = False,
        workers: int = 1,
        max_queue: int = 1_000,
        max_queue_bytes: int = 64 * 2**20,
        sweep_every_s: float | None = 1.0,
        perplexity_source: str = "generation",
        scorer: Callable[[Sequence[int]], float] | None = None,
        log: DecisionLog | None = None,
        metrics: DecisionMetrics | None = None,
        meter: Any = None,
    ) -> None:
        self.controller = lmcache_controller
        self.config = HeuristicConfig() if config is None else config
        self.clock = clock
        self._records = RecordKeeper(max_records, log, metrics, notify, meter)
        options = lmcache_controller, self.config, lambda: self.clock(), costs, log
        self._measured = RequestMetadata(None, perplexity_source, scorer)
        self._decider = Decider(
            self._decide,
            lmcache_controller,
            self.config,
            self._measured,
            self._records,
            lambda: self.clock(),
            workers=check_whole("workers", workers) if background else 0,
            max_queue=max_queue,
            max_queue_bytes=max_queue_bytes,
            sweep_every_s=sweep_every_s,
            keep_prompts=keep_prompts,
            **who_decides(policy, *options),
        )
        self.records, self.claims = self._records.records, self._decider.claims
        self._llm: Any = None
        if llm is not None:
            self.set_llm(llm)
        if metrics is not None:
            self._decider.watch(metrics)

    def __exit__(self, *_exc_info: object) -> None:
        self.close()

    @property
    def llm(self) -> Any:
        """The engine, None before it is set; what is generated with it alone is not managed."""
        return self._llm

    def set_llm(self, llm: Any) -> None:
        """Set the engine: anything with vLLM's ``generate(prompt, sampling_params)``."""
        self._llm, self._engine = llm, Engine(llm, self._decider.handover is not None)
        self._check = RequestCheck()
        self.controller.attach_engine(llm)
        if self._engine.vocab_size:
            self._measured.vocab_size = self._engine.vocab_size

    # ---- the seven steps ---------------------------------------------------------------

    def generate_and_manage(
        self,
        prompt: str,
        sampling_params: Any,
        metadata: Mapping[str, float] | None = None,
        **options: Any,
    ) -> str:
        """Generate text, then place the prompt's KV cache.

        Parameters
        ----------
        prompt : str
            The prompt.
        sampling_params : vllm.SamplingParams
            Handed to the engine; a copy that also asks for log-probabilities where
            the perplexity is measured from them.
        metadata : mapping, optional
            See `KVMetadata`. What is not given, None or NaN is measured; what
            `check_metadata` refuses is the reason in the decision's record.
        **options
            ``cache_salt``, ``lora_request``: see `generate`.

        Returns
        -------
        str
            The generated text.

        Raises
        ------
        RuntimeError
            Before an engine was set.
        TypeError
            For a list of prompts: use `generate_and_manage_batch`.
        ValueError
            See `admit`. The engine's own errors pass through; nothing else is ever raised.
        """
        if not is_one_prompt(prompt):
            raise TypeError("prompt must be one prompt; got a list: use generate_and_manage_batch")
        (managed,) = self.generate(prompt, sampling_params, [metadata], **options)  # steps 1 to 6
        return text_of(managed.output)  # 7. return the text

    def generate(
        self,
        prompts: Any,
        sampling_params: Any,
        metadata: Mapping[str, float] | Sequence[Mapping[str, float] | None] | None = None,
        *,
        cache_salt: str | None = None,
        lora_request: Any = None,
    ) -> list[ManagedOutput]:
        """Generate in one engine call; return vLLM's own outputs, each with its decision.

        Parameters
        ----------
        prompts : str, or sequence of prompts
            One prompt (a text, token ids or one of vLLM's mappings) or many, shape (n,).
        sampling_params : vllm.SamplingParams or sequence of them
            One for all, or one each.
        metadata : mapping or sequence of mapping, optional
            One for all, or one each (None = all measured), shape (n,).
        cache_salt : str, optional
            The tenant; a prompt may name its own: ``{"prompt": text, "cache_salt": "a"}``.
        lora_request : vllm.lora.request.LoRARequest or sequence of them, optional
            One for all, or one each; each adapter has KV of its own.

        Returns
        -------
        list of ManagedOutput
            In the order of the prompts, shape (n,). ``decision.result()`` is the
            DecisionRecord: there at once, or in the background soon.

        Raises
        ------
        RuntimeError, TypeError, ValueError
            No engine, or it has died (`EngineDied`); an asynchronous one; not as many of a list
            as prompts; see `admit`.

        Notes
        -----
        A call that is interrupted leaves nothing in the engine: what is under way is aborted, and
        its KV cache claimed for ``base_ttl``.
        A record's ``generate_s`` is the call's time divided by its prompts. Sequences
        beyond a prompt's first one need no KV cache of their own: the prompt's is placed.
        """
        one = is_one_prompt(prompts)
        prompts = [prompts] if one else list(prompts)
        given = one_each("metadata", metadata, prompts)
        if not prompts:
            return []
        self._decider.start()
        engine, logprobs = self._ready_engine(), self._measured.logprobs_wanted
        sampling = one_each("sampling_params", sampling_params, prompts)
        loras = one_each("lora_request", lora_request, prompts)
        requests = zip(prompts, sampling, loras)
        prompts, salts = zip(*(self.admit(*each, cache_salt=cache_salt) for each in requests))
        options = {} if lora_request is None else {"lora_request": lora_request}
        asked = prompts[0] if one else list(prompts)
        return self._decider.managed_call(
            lambda: engine.generate(asked, sampling_params, logprobs, **options),  # step 1
            zip(prompts, given, salts),
        )

    def generate_and_manage_batch(
        self,
        prompts: Sequence[str],
        sampling_params: Any,
        metadata: Mapping[str, float] | Sequence[Mapping[str, float] | None] | None = None,
        **options: Any,
    ) -> list[str]:
        """Generate texts in one engine batch, then place each prompt's KV cache.

        As `generate` for a list of prompts, of which each answer's text is returned, shape (n,).
        """
        if is_one_prompt(prompts):
            raise TypeError("prompts must be a list of prompts, got one prompt")
        managed = self.generate(prompts, sampling_params, metadata, **options)
        return [text_of(output) for output, _ in managed]

    def _decide(self, draft, made):
        """Fill the draft in step by step: a failure leaves what was known before it."""
        metadata, draft.metadata_sources = self._decider.metadata_of(made, draft.time_s)
        draft.metadata, tokens = metadata, made.tokens.tolist()  # step 2
        draft.ttl_s = float(self.config.ttl(metadata))  # step 4
        draft.wanted_tier = str(self.config.tier(metadata))  # step 5
        self.controller.note_generated(tokens, **under(made.cache_salt))
        self._decider.placement.place(draft, tokens, made.cached_tokens)  # steps 3 and 6

    # ---- around them ----------------------------------------------------------------------

    def admit(
        self, *request: Any, cache_salt: str | None = None, **options: Any
    ) -> tuple[Any, str]:
        """Return the prompt as the engine is to get it, and the salt that its KV is kept under.

        For a server, before its engine; `generate` asks it too.

        Parameters
        ----------
        *request, **options
            The prompt, its sampling parameters and its adapter, and what else the engine is
            called with, as `RequestCheck` takes them.
        cache_salt : str, optional
            The tenant; None = the controller's.

        Raises
        ------
        ValueError
            What would end the engine, or change KV cache unseen: names it.
        """
        self._ready_engine()
        tenant = cache_salt or getattr(self.controller, "cache_salt", "") or cache_salt
        return self._check(*request, cache_salt=tenant, **options)

    def measurable(self, sampling_params: Any, perplexity: bool = True) -> Any:
        """Return sampling parameters that the engine is to get for `manage`, a copy.

        A `perplexity` can be measured from its answer; a server that decides waits for `manage`.
        """
        wanted = self._measured.logprobs_wanted
        return self._ready_engine().asking(sampling_params, perplexity * wanted)

    def manage(
        self,
        prompt: Any,
        output: Any,
        metadata: Mapping[str, float] | None = None,
        generate_s: float = 0.0,
        cache_salt: str | None = None,
    ) -> Future[DecisionRecord]:
        """Place the KV cache of a generation that somebody else made; never raises.

        For a server. `output` is as vLLM's RequestOutput; it took `generate_s` seconds.
        `cache_salt` is what `admit` has said; None = as prompt and output say.
        The future comes to the record always: failed, given up or closed, it has the reason.
        """
        self._decider.start()
        now = self._decider.now()
        return self._decider.submit(prompt, output, metadata, generate_s, now, cache_salt)

    def sweep(self, now_s: float | None = None) -> list[DecisionRecord]:
        """Take expired claims down the ladder now; returns a record for each."""
        return self._decider.sweep(now_s)

    def recover(self, log: str | Path | Iterable[DecisionRecord]) -> dict[str, int]:
        """Make the claims again that an earlier process has logged; see `recover_claims`.

        KV that LMCache holds and the log does not name is claimed for ``base_ttl``. Claims
        that this process has made since are kept: the later access counts.
        """
        return self._decider.recover(log)

    @property
    def shed_decisions(self) -> int:
        """How many decisions were given up because too many waited."""
        return self._decider.shed

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until every decision so far is made; False if the time was not enough."""
        return self._decider.flush(timeout_s)

    def close(self) -> None:
        """Make the decisions that wait, end the threads, release the connections."""
        self._decider.close()
        if self._records.meter is not None:
            self._records.meter.close()
        self.controller.close()

    def _ready_engine(self):
        if self._llm is None:
            raise RuntimeError("no engine yet: call set_llm(llm) first")
        return self._engine
