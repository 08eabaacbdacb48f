"""Who runs when, without an engine: nobody starves, nobody is evicted, nothing is left behind."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_thoughtx.runtime.scheduler import HEAD_START, Scheduler


class Simulated:
    """Requests of so many segments and tokens, on a scheduler whose exchanges are played on a list of slots."""

    def __init__(self, num_slots, *, fills_first=False, choose_slot=lambda request, free: free[0]):
        self.scheduler = Scheduler(num_slots, fills_first=fills_first, choose_slot=choose_slot)
        self.slots = [None] * num_slots  # whose contents a slot holds
        self.left = {}  # request -> [segments, tokens]
        self.ended, self.admitted = [], []

    def add(self, request, segments, tokens, priority=0):
        self.left[request] = [segments, tokens]
        self.scheduler.add(request, priority)

    def end(self, request):
        a, b = self.scheduler.end(request)
        self.slots[a], self.slots[b] = self.slots[b], self.slots[a]
        del self.left[request]

    def tick(self):
        """One tick, with what must hold of each."""
        scheduler = self.scheduler
        before, was_filling, was_waiting = list(scheduler.running), scheduler.filling, scheduler.waiting
        plan = scheduler.plan()
        assert plan.decode == (() if scheduler.fills_first and plan.fill is not None else tuple(before))  # each running row advances
        if was_filling is not None:
            assert plan.fill == was_filling[0]  # who has begun goes on
        elif was_waiting and len(before) < scheduler.num_slots:
            assert plan.fill == was_waiting[0] and scheduler.filling[1] >= len(before)
            self.slots[scheduler.filling[1]] = plan.fill
            self.admitted.append(plan.fill)
        for request in plan.decode:
            assert self.slots[scheduler.slot_of(request)] == request  # its slot holds what is its own
            self.left[request][1] -= 1
            if self.left[request][1] == 0:
                self.end(request)
                self.ended.append(request)
        if plan.fill is not None:
            self.left[plan.fill][0] -= 1
            if self.left[plan.fill][0] == 0:
                a, b = scheduler.filled()
                self.slots[a], self.slots[b] = self.slots[b], self.slots[a]
        assert [self.slots[slot] for slot in range(len(scheduler.running))] == scheduler.running
        assert len(set(scheduler.running)) == len(scheduler.running) <= scheduler.num_slots


def test_ten_thousand_events_leave_nothing_behind():
    rng = random.Random(0)
    run = Simulated(5, choose_slot=lambda request, free: rng.choice(free))
    num_added = num_cancelled = 0
    for _ in range(10_000):
        event = rng.random()
        if event < 0.25:
            run.add(num_added, rng.randint(1, 4), rng.randint(1, 9), rng.choice([0, 0, 0, 1, 3]))
            num_added += 1
        elif event < 0.4 and run.left:
            run.end(rng.choice(list(run.left)))
            num_cancelled += 1
        else:
            run.tick()
        scheduler = run.scheduler
        assert num_added == len(run.ended) + num_cancelled + len(run.left)
        assert len(run.left) == len(scheduler.waiting) + len(scheduler.running) + (scheduler.filling is not None)
        assert len(scheduler._waiting) == len(scheduler._queue)
    while not run.scheduler.is_idle:
        run.tick()
    assert not run.left and not run.scheduler._waiting and not run.scheduler._queue and len(run.ended) > 1000


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    num_slots=st.integers(1, 6),
    fills_first=st.booleans(),
    jobs=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5), st.integers(1, 12), st.integers(0, 2)), min_size=1, max_size=30),
)
def test_who_came_first_is_first_and_all_end(num_slots, fills_first, jobs):
    """Arrivals at any tick, prompts and answers of any length: among equals in the order of their coming; everyone ends in the time that
    the work takes."""
    run, tick, waiting = Simulated(num_slots, fills_first=fills_first), 0, list(enumerate(jobs))
    while waiting or not run.scheduler.is_idle:
        for request, (_, segments, tokens, priority) in [one for one in waiting if one[1][0] <= tick]:
            run.add(request, segments, tokens, priority)
        waiting = [one for one in waiting if one[1][0] > tick]
        run.tick()
        tick += 1
        assert tick <= 20 + sum(segments + tokens for _, segments, tokens, _ in jobs) + len(jobs)
    assert sorted(run.ended) == list(range(len(jobs)))
    for priority in range(3):
        equals = [request for request in run.admitted if jobs[request][3] == priority]
        assert equals == sorted(equals, key=lambda request: (jobs[request][0], request))


def test_priority_is_a_head_start_and_no_more():
    """A stream of urgent requests that fills every slot does not keep a patient one out for longer than its head start."""
    run = Simulated(1)
    run.add(0, 1, 1)
    run.add(1, 1, 1, priority=2)
    run.tick()
    assert run.admitted == [1]
    for request in range(2, 1000):
        run.add(request, 1, 1, priority=2)
        run.tick()
        run.tick()
        if 0 in run.ended:
            break
    assert 0 in run.ended and HEAD_START <= run.scheduler.num_ticks - 2 <= 2 * HEAD_START + 6
