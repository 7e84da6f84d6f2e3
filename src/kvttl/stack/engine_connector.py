"""LMCache's connector for vLLM: no aborted request ends the engine, no other's KV is shared.

vLLM loads it by name: ``KVTransferConfig(kv_connector="LMCacheMPConnector",
kv_connector_module_path="kvttl.stack.engine_connector", ...)``, as
`kvttl.stack.config.kv_transfer_config` does.

vLLM frees a finished request's blocks at one report of the worker. Which one is agreed in
`request_finished`: True = the report of its store; False = at once, or, when its load is under
way, the report of the load. LMCache 0.5.6 answers True for every request and reports a store
also for one that is aborted while it loads: the engine ends at the second report (vLLM issue
46240, LMCache issue 4938), and where LMCache copies by itself (GPU) the blocks may be free for
others before the load has ended. Here such a request waits for the report of its load alone,
and the report of a store waits for the request's last store.

LMCache keys KV by token ids, model and ``cache_salt`` (vLLM issue 44250). Here a LoRA adapter,
embeddings and images are part of the salt, also of requests that no manager has seen.

A server with this kit's module (`kvttl.server`) is told how each request ended and how many tokens
its answer has: nothing else that an engine sends says it.
"""

import inspect
import json
import logging
import time
from typing import Any
from uuid import uuid4

from lmcache.v1.multiprocess.protocols.server_module import ServerModuleCallRequest
from vllm.distributed.kv_transfer.kv_connector.v1 import lmcache_mp_connector
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from kvttl.lmcache.salts import LoadedAdapters, kept_under
from kvttl.stack.cpu_lora import spare_tokens_without_adapter
from kvttl.stack.engine_watch import watch_owner

logger = logging.getLogger(__name__)

_LOOK_UP_S = 1.0  # the longest that an abort waits for a look-up that is under way


class LMCacheMPConnector(lmcache_mp_connector.LMCacheMPConnector):
    """Connects vLLM to an LMCache server; parameters are those of LMCache's own connector.

    Raises
    ------
    RuntimeError
        This vLLM or LMCache works in another way than the ones it was written for.
    """

    def __init__(self, vllm_config: Any, *args: Any, **options: Any) -> None:
        _check_versions()
        watch_owner()
        if vllm_config.lora_config is not None:
            spare_tokens_without_adapter()
        super().__init__(vllm_config, *args, **options)
        self._loading: set[str] = set()  # scheduler: a load was ordered and not yet reported
        self._aborted_loads: set[str] = set()  # scheduler: finished meanwhile; for the workers
        self._adapters = LoadedAdapters()  # scheduler
        self._finished: set[str] = set()  # worker: finished, while a store is under way
        # Scheduler: of each server, whether it has the module; LMCache logs an unknown call. A word
        # of no request also says that others will come, so that the module waits for the first.
        adapter = vars(self).get("scheduler_adapter")
        clients = adapter.req_clients.values() if adapter else ()
        ask = ServerModuleCallRequest("kvttl.ended", b'["", null, 0]')
        self._asked = [(client, client.server_module_call(ask)) for client in clients]

    # ---- in the scheduler's process -----------------------------------------

    def _get_or_create_request_tracker(self, request):
        """Return LMCache's notes on a request, under a salt of all that its KV depends on."""
        tracker = super()._get_or_create_request_tracker(request)
        if not hasattr(tracker, "has_salt"):
            tracker.cache_salt, tracker.has_salt = self._salt_of(request), True
            tracker.mm_adjusted_prompt_ids = []  # LMCache's own way for images: the salt has them
        return tracker

    def _salt_of(self, request):
        """Return the manager's salt; of a request that it has not seen, one made here."""
        images = [feature.identifier for feature in request.mm_features]
        content = {"images": images or None, "prompt_embeds": request.prompt_embeds}
        content["prompt_is_token_ids"] = request.prompt_is_token_ids
        try:
            content["adapter"] = self._adapters.content_of(request.lora_request)
            return kept_under(request.cache_salt, **content)
        except Exception:  # nothing may end the engine; this request's KV is not shared
            logger.exception("no salt for request %s", request.request_id)
            return kept_under(None, request=uuid4().hex)

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        """Note a request whose KV cache vLLM will wait for."""
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if num_external_tokens > 0:
            self._loading.add(request.request_id)

    def update_connector_output(self, connector_output) -> None:
        """Note the loads that have ended, before vLLM acts on them."""
        super().update_connector_output(connector_output)
        self._loading.difference_update(connector_output.finished_recving or ())

    def request_finished(self, request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        """Return whether the blocks wait for the report of a store."""
        tracker = self.request_trackers.get(request.request_id)
        if tracker is None:
            request.kv_transfer_params = None  # aborted unseen: LMCache has nothing to tell of it
        elif tracker.state.name == "PREFETCHING":
            self._unlock(request.request_id, tracker)
        self._tell_end(request)  # before the session's end, over the same queue
        waits_for_store, parameters = super().request_finished(request, block_ids)
        if request.request_id in self._loading:  # then vLLM waits for the load by itself
            self._loading.remove(request.request_id)
            self._aborted_loads.add(request.request_id)
            waits_for_store = False
        return waits_for_store, parameters

    def _tell_end(self, request):
        """Tell servers how a request ended; the scheduler waits for no answer."""
        try:
            word = json.dumps([request.request_id, *_end_of(request)]).encode()
            for client, asked in self._asked if self.scheduler_adapter.is_healthy else ():
                if getattr(asked.result_, "success", False):
                    client.server_module_call(ServerModuleCallRequest("kvttl.ended", word))
        except Exception:  # nothing may end the engine
            logger.exception("no word of the end of request %s", request.request_id)

    def _unlock(self, request_id, tracker):
        """Free what the look-up of a request has locked that is aborted before its load.

        LMCache would keep it locked, and in its tier, for five minutes.
        """
        adapter, ends_s = self.scheduler_adapter, time.monotonic() + _LOOK_UP_S
        while (hit_tokens := adapter.check_lookup_result(request_id)) is None:
            if time.monotonic() > ends_s:
                return
            time.sleep(0.001)
        if hit_tokens:
            salt = {"cache_salt": tracker.cache_salt, "request_configs": tracker.request_configs}
            adapter.free_lookup_locks(tracker.get_token_ids(), 0, hit_tokens, request_id, **salt)

    def build_connector_meta(self, scheduler_output):
        """Tell the workers which of the finished requests are not to be reported as stored."""
        metadata = super().build_connector_meta(scheduler_output)
        metadata.aborted_loads = self._aborted_loads & scheduler_output.finished_req_ids
        self._aborted_loads -= metadata.aborted_loads
        return metadata

    # ---- in the workers -----------------------------------------------------

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return the requests whose stores have ended, and those whose loads have."""
        self._finished |= finished_req_ids - self._get_connector_metadata().aborted_loads
        storing = self._finished & self.worker_adapter.store_futures.keys()
        stored, loaded = super().get_finished(self._finished - storing)
        self._finished = storing
        return stored, loaded


def _end_of(request):
    """Return a request's finish reason and its answer's tokens, as its engine knows them.

    A client that leaves and a stop string are both an abort there: None if it may be the latter.
    """
    reason = RequestStatus.get_finished_reason(request.status)
    if f"{reason}" == "abort" and getattr(request.sampling_params, "stop", None):
        reason = None
    # "stop" is 0: an IntEnum
    return None if reason is None else f"{reason}", request.num_output_tokens


def _check_versions() -> None:
    """Refuse a vLLM or LMCache that would not call, or not heed, the methods above."""
    own = ("__", "_abc", "_salt_of", "_tell_end", "_unlock")
    hooks = [name for name in vars(LMCacheMPConnector) if not name.startswith(own)]
    base = lmcache_mp_connector.LMCacheMPConnector
    missing = [name for name in hooks if not hasattr(base, name)]
    if "delay_free_blocks" not in inspect.signature(Scheduler._free_request).parameters:
        missing.append("Scheduler._free_request(delay_free_blocks)")
    if missing:
        raise RuntimeError(
            f"engine_connector was written for vLLM 0.30 and LMCache 0.5.6; here {missing} "
            "are missing: leave kv_connector_module_path out of the KVTransferConfig if aborted "
            "requests no longer end this engine, else install the versions above"
        )
