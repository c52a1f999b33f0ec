"""vLLM's scheduler, which also ends the requests whose images failed (``failures``): a request's fault must stay its own."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from . import failures
from .front import FIELD

logger = init_logger("vllm.mllm_efficient")


class EndsFailed:
    """Over a scheduler of vLLM."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.failures = failures.Reader()

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """After a step: what vLLM's own makes of it, and an error for every request with an image that failed."""
        failed = self._failed()
        stock: Any = super()
        ended = stock.finish_requests(failed, RequestStatus.FINISHED_ERROR) if failed else []
        outputs = stock.update_from_output(scheduler_output, model_runner_output)
        for request in ended:
            logger.error("request %s ends with an error: %s", request.request_id, failed[request.request_id])
            failures.note_request(request.request_id, failed[request.request_id])
            said = EngineCoreOutput(request.request_id, [], finish_reason=request.get_finished_reason(), events=request.take_events())
            if request.client_index not in outputs:
                outputs[request.client_index] = EngineCoreOutputs(outputs=[])
            outputs[request.client_index].outputs.append(said)
        return outputs

    def _failed(self) -> dict[str, str]:
        """Why, of each request that an image of failed in any step until now."""
        known, requests = self.failures.read(), getattr(self, "requests", {})
        if not known:
            return {}
        why = {name: next((known[m] for m in _marks(request) if m in known), None) for name, request in requests.items()}
        return {name: reason for name, reason in why.items() if reason is not None}


def _marks(request: Any) -> list[int]:
    """The fingerprints of a request's images."""
    data = [feature.data[FIELD].data for feature in request.mm_features if feature.data is not None and FIELD in feature.data]
    return [int(mark[1]) for mark in data]


class OfRequests(EndsFailed, Scheduler):
    pass


class OfRequestsAhead(EndsFailed, AsyncScheduler):
    pass


def scheduler(vllm_config: Any, **kwargs: Any) -> Any:
    """The scheduler of a configuration, as vLLM chooses between its own two."""
    cls = OfRequestsAhead if vllm_config.scheduler_config.async_scheduling else OfRequests
    return cls(vllm_config=vllm_config, **kwargs)
