"""What happens when one of a request's waits is over. Each wait has a timer (invariant 9)."""

from __future__ import annotations

from splitserve.errors import DeadlineExceeded, NoWorkers
from splitserve.protocol.states import Role
from splitserve.router.desk import Desk, Wait
from splitserve.router.lifecycle import FORWARD_S, PROGRESS_S, Lifecycle
from splitserve.router.refusals import WaitedTooLong

COME_BACK_S = 5.0


def due(life: Lifecycle, wait: Wait, desk: Desk) -> None:
    """While our own bus is sick, the waits for others pause; deadlines do not."""
    request = life.request
    if wait is Wait.DEADLINE:
        life.fail(DeadlineExceeded(f"the request took longer than its {request.submission.timeout_s:g} s"))
    elif wait is Wait.AGE:
        _too_old(life, desk)
    elif desk.bus_sick and desk.rules.pause_when_sick:
        request.timer(wait, PROGRESS_S if wait is Wait.PROGRESS else FORWARD_S)
    elif wait is Wait.PROGRESS:
        life.lose_prefill("no progress")
    elif wait is Wait.AGAIN:
        life.ask_again()
    else:
        life.forward()


def _too_old(life: Lifecycle, desk: Desk) -> None:
    """Nobody took it for `queue_timeout`. An answer that has begun waits on, while there is any worker."""
    request, seconds = life.request, desk.settings.queue_timeout
    model = request.submission.model
    serving = desk.fleet.serving(Role.DECODE, model)
    if not desk.rules.queue_age or (serving and len(request.transcript)):
        request.timer(Wait.AGE, seconds)
    elif serving:
        life.fail(WaitedTooLong(f"no worker had room for it in {seconds:g} s: try again", retry_after_s=COME_BACK_S))
    else:
        life.fail(NoWorkers(f"no decode worker for {model!r} in {seconds:g} s", retry_after_s=COME_BACK_S))
