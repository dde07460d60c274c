"""Turns at the denoisers: in fair order, without holding back who is alone."""

from __future__ import annotations

import asyncio

from serve.fair_share import FairShare
from serve.tenant_settings import NamedTenant, TenantSettings


class Denoisers:
    """Two cards, each of which does one picture at a time, in the order they were sent."""

    def __init__(self, share: FairShare) -> None:
        self.share = share
        self.cards = asyncio.Semaphore(2)
        self.order: list[str] = []
        self.sent = 0

    async def make(self, tenant: str, priority: int = 0, cost_s: float = 1.0) -> None:
        async with self.share.turn(tenant, cost_s, priority) as begun:
            self.sent += 1
            async with self.cards:
                begun()
                self.order.append(f"{tenant}{priority or ''}")
                for _ in range(3):
                    await asyncio.sleep(0)


async def test_a_flood_does_not_hold_up_who_comes_later():
    works = Denoisers(FairShare(TenantSettings()))
    flood = [asyncio.create_task(works.make("flood")) for _ in range(100)]
    while len(works.order) < 20:
        await asyncio.sleep(0)
    late = [asyncio.create_task(works.make("late")) for _ in range(10)]
    await asyncio.gather(*late)
    # Half of the work since, but for what had been sent ahead.
    assert len(works.order) <= 20 + 2 * 10 + 8
    await asyncio.gather(*flood)
    assert works.order.count("flood") == 100
    assert works.share.waiting == 0


async def test_weights_count():
    heavy = NamedTenant(name="heavy", weight=3.0)
    works = Denoisers(FairShare(TenantSettings(named=(heavy,))))
    tasks = [
        asyncio.create_task(works.make(tenant)) for _ in range(80) for tenant in ("light", "heavy")
    ]
    await asyncio.gather(*tasks)
    first = works.order[:80]
    assert 55 <= first.count("heavy") <= 65


async def test_the_default_tenant_alone_is_never_held_back():
    works = Denoisers(FairShare(TenantSettings()))
    tasks = [asyncio.create_task(works.make("default")) for _ in range(50)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert works.sent == 50
    await asyncio.gather(*tasks)


async def test_priority_orders_a_tenants_own():
    works = Denoisers(FairShare(TenantSettings()))
    tasks = [asyncio.create_task(works.make("a", 1 + number // 10)) for number in range(30)]
    await asyncio.gather(*tasks)
    # The first few were sent before there was anything to order.
    assert works.order[8:] == sorted(works.order[8:], reverse=True)


async def test_who_goes_away_leaves_no_gap():
    works = Denoisers(FairShare(TenantSettings()))
    tasks = [asyncio.create_task(works.make("a")) for _ in range(60)]
    for _ in range(5):
        await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert works.share.waiting == 0
    again = [asyncio.create_task(works.make("b")) for _ in range(10)]
    await asyncio.wait_for(asyncio.gather(*again), 5)
