"""``cache`` on a denoiser: policies as functions of a trajectory, options, and engines step by step."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import optpass
from optpass.capture import capture
from optpass.errors import OptpassError
from optpass.export import artifact
from optpass.grammar import parse
from optpass.manager import apply
from optpass.passes.cache import worldcache
from optpass.passes.cache.policies import Policy, policies
from optpass.passes.cache.worldcache import WorldCache, apart, like, quantile
from optpass.rewrite import Refused
from optpass.runtime import session as runtime
from optpass.runtime.denoise import Denoiser, Run
from optpass.runtime.engines.base import open_engine
from optpass.runtime.features import COUNT, COUNTED, SINCE, STEP, STREAK, THRESHOLD, counter
from optpass.runtime.schedules import asked
from tests.denoisers import SAMPLER, Eager, Small, example, program, session, stages

Array = NDArray[np.float64]


def policy(name: str, **options: Any) -> Policy:
    kind = policies()[name]
    return kind(kind.options_type(**options))


@dataclass
class Walk:
    """A policy along features ``[steps][features]``: what each step was given, and the state behind it."""

    policy: Policy
    features: Sequence[Sequence[Tensor]]
    probes: Sequence[Sequence[Tensor]] | None = None
    computed: list[int] = field(default_factory=list)
    made: list[list[Tensor]] = field(default_factory=list)
    states: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        state = begun(self.policy, self.features[0], self.probed(0), len(self.features))
        options = self.policy.options
        for step, features in enumerate(self.features):
            due = self.policy.due(state, self.probed(step))
            ahead = step < options.warmup or step == len(self.features) - 1
            starved = len(self.computed) < self.policy.needs or step - self.computed[-1] > options.streak
            if ahead or starved or (due is not None and bool(due)):
                self.computed.append(step)
                self.made.append(list(features))
                state = {**state, **behind(self.policy, state, features, self.probed(step))}
            else:
                self.made.append(self.policy.predict(state))
                changed = self.policy.predicted(state, self.probed(step))
                state = {**counted(state, STEP, SINCE), **changed}
            self.states.append(state)

    def probed(self, step: int) -> Sequence[Tensor]:
        return () if self.probes is None else self.probes[step]


def begun(made: Policy, features: Sequence[Tensor], probes: Sequence[Tensor], steps: int) -> dict[str, Tensor]:
    """The state before the first step."""
    options = made.options.model_dump()
    state = {COUNTED: torch.zeros(7, dtype=torch.int32), THRESHOLD: torch.tensor([options.get("threshold", 0.0)])}
    counter(state, STREAK)[:] = options["streak"]
    return {**state, **made.start(features, probes)}


def counted(state: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    """A state with some counters one further."""
    found = {**state, COUNTED: state[COUNTED].clone()}
    for name in names:
        counter(found, name)[:] += 1
    return found


def behind(
    made: Policy, state: Mapping[str, Tensor], features: Sequence[Tensor], probes: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The state behind a computed step."""
    found = counted(state, STEP, COUNT)
    counter(found, SINCE)[:] = 1
    return {**found, **made.computed(state, features, probes)}


def powers(coefficients: Sequence[Tensor], steps: int) -> list[list[Tensor]]:
    """A polynomial of the step, lowest power first."""
    return [[sum((c * t**i for i, c in enumerate(coefficients)), torch.tensor(0.0))] for t in range(steps)]


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers, on which sums and products are exact."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


# polynomials


@pytest.mark.parametrize("basis", ["newton", "taylor"])
def test_a_feature_that_moves_in_a_straight_line_is_predicted_exactly(basis: str) -> None:
    features = powers([whole(2, 3, 4), whole(2, 3, 4, seed=1)], 20)
    walk = Walk(policy("taylorseer", order=1, basis=basis), features)
    assert walk.computed == [0, 1, 2, 6, 10, 14, 18, 19]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(walk.made, features, strict=True))


def test_a_feature_that_bends_evenly_is_exact_by_divided_differences_and_off_by_its_bend_otherwise() -> None:
    bend = whole(2, 3, 4, seed=2)
    features = powers([whole(2, 3, 4), whole(2, 3, 4, seed=1), bend], 11)
    newton = Walk(policy("taylorseer", order=2), features)
    assert newton.computed == [0, 1, 2, 6, 10]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(newton.made, features, strict=True))
    taylor = Walk(policy("taylorseer", order=2, basis="taylor"), features)
    for k in (1, 2, 3):
        # the difference of one step before the last computed one is the slope half a step further back
        assert torch.equal(taylor.made[2 + k][0] - features[2 + k][0], -k * bend)
        # a distance of 4 behind one of 1: F' = b + 8c, F'' = (8c - 3c) / 4 where it is b + 12c and 2c
        assert torch.equal(taylor.made[6 + k][0] - features[6 + k][0], -4 * k * bend - 0.375 * k**2 * bend)


@given(
    times=st.lists(st.integers(1, 6), min_size=5, max_size=8),
    coefficients=st.lists(st.integers(-4, 4), min_size=1, max_size=5),
    away=st.integers(1, 5),
)
def test_newton_is_exact_at_any_distances_up_to_its_order(times: list[int], coefficients: list[int], away: int) -> None:
    order = len(coefficients) - 1
    made = policy("taylorseer", order=order)
    at = np.cumsum([0, *times])
    exact = np.polynomial.polynomial.polyval(np.array([*at, at[-1] + away], np.float64), coefficients)
    state = begun(made, [torch.zeros(1, 1, 1)], (), 100)
    for step, value in zip(at, exact, strict=False):
        counter(state, STEP)[:] = int(step)
        state |= behind(made, state, [torch.full((1, 1, 1), float(value))], ())
    counter(state, STEP)[:] = int(at[-1]) + away
    found = float(made.predict(state)[0])
    # a difference of order i carries the roundings of those before it, each 6e-8 of the largest value and doubled by a
    # subtraction, times the weights of at most 5 * 11 * 17 * 23 of the distances over the same distances
    assert abs(found - exact[-1]) <= 2.0**-24 * 2**5 * (1 + away) ** order * max(abs(exact).max(), 1)


def test_an_interval_copies_what_was_last_computed() -> None:
    features = [[torch.randn(2, 3, 4), torch.randn(2, 5)] for _ in range(12)]
    walk = Walk(policy("interval", streak=2, warmup=2), features)
    assert walk.computed == [0, 1, 4, 7, 10, 11]
    for step, made in enumerate(walk.made):
        last = max(c for c in walk.computed if c <= step)
        assert all(torch.equal(a, b) for a, b in zip(made, features[last], strict=True))
    assert Walk(policy("interval", streak=0, warmup=1), features).computed == list(range(12))


@pytest.mark.parametrize("basis", ["newton", "taylor"])
@pytest.mark.parametrize("known", [1, 2, 3])
def test_an_order_beyond_the_computed_steps_is_that_which_they_give(basis: str, known: int) -> None:
    features = [[torch.randn(2, 3, generator=torch.Generator().manual_seed(t))] for t in range(known)]
    found = []
    for order in (known - 1, known, 4):
        made = policy("taylorseer", order=order, basis=basis)
        state = begun(made, features[0], (), 50)
        for feature in features:
            state |= behind(made, state, feature, ())
        found.append(made.predict(state)[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# signals


def relative(new: Array, old: Array) -> float:
    """Of all samples the largest mean distance over the mean magnitude."""
    return max(float(np.abs(a - b).mean() / np.abs(b).mean()) for a, b in zip(new, old, strict=True))


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SIGNALS = st.tuples(st.integers(0, 10_000), st.floats(0.05, 3.0), st.integers(1, 3))


@given(SIGNALS, st.sampled_from([[1.0, 0.0], [0.5, 0.1], [2.0, -0.5, 0.02]]))
def test_teacache_adds_up_change_over_predicted_steps_and_starts_anew_when_it_computes(
    drawn: tuple[int, float, int], coefficients: list[float]
) -> None:
    seed, threshold, batch = drawn
    probes = [[numbers(seed + t, batch, 3, 4)] for t in range(25)]
    features = [[torch.zeros(batch, 1, 1)] for _ in probes]
    walk = Walk(policy("teacache", threshold=threshold, coefficients=coefficients), features, probes)
    computed, added = [0], 0.0
    for t in range(1, 24):
        change = relative(probes[t][0].double().numpy(), probes[t - 1][0].double().numpy())
        added += float(np.polyval(coefficients, change))
        if added >= threshold:
            computed, added = [*computed, t], 0.0
        assert abs(float(walk.states[t]["change"]) - added) <= 1e-4 * (1 + abs(added))
    assert walk.computed == [*computed, 24]


@given(SIGNALS)
def test_first_block_looks_at_the_last_computed_step_alone(drawn: tuple[int, float, int]) -> None:
    seed, threshold, batch = drawn
    walks = numbers(seed, 25, batch, 3, 4).cumsum(0) + 3
    probes = [[probe] for probe in walks]
    features = [[torch.zeros(batch, 1, 1)] for _ in probes]
    walk = Walk(policy("first-block", threshold=threshold), features, probes)
    computed = [0]
    for t in range(1, 24):
        if relative(walks[t].double().numpy(), walks[computed[-1]].double().numpy()) >= threshold:
            computed.append(t)
    assert walk.computed == [*computed, 24]
    assert policy("first-block").predicted(walk.states[0], probes[1]) == {}


@pytest.mark.parametrize("name", ["teacache", "first-block"])
def test_threshold_of_nothing_computes_all(name: str) -> None:
    probes = [[torch.ones(1, 3, 4)] for _ in range(10)]
    features = [[torch.zeros(1, 1, 1)] for _ in probes]
    assert Walk(policy(name, threshold=0), features, probes).computed == list(range(10))
    assert Walk(policy(name, threshold=1e-6), features, probes).computed == [0, 9]


@pytest.mark.parametrize("name", ["teacache", "first-block"])
def test_one_sample_that_changes_computes_the_step_for_all(name: str) -> None:
    still, moving = torch.ones(1, 3, 4), torch.ones(1, 3, 4)
    moving[..., 0] = 9.0
    features = [[torch.zeros(2, 1, 1)] for _ in range(4)]
    probes = [[torch.cat([still] * 2)], [torch.cat([still, moving])], [torch.cat([moving, still])]]
    # twice itself for one sample, once over both
    assert Walk(policy(name, threshold=1.5), features, [*probes, probes[0]]).computed == [0, 1, 2, 3]
    assert Walk(policy(name, threshold=2.5), features, [*probes, probes[0]]).computed[:2] != [0, 1]


@pytest.mark.parametrize("name", ["teacache", "first-block", "worldcache"])
def test_a_signal_that_is_no_number_computes(name: str) -> None:
    made = policy(name)
    probes = [torch.ones(2, 3, 4)]
    state = begun(made, [torch.ones(2, 3, 4)], probes, 50)
    for _ in range(3):
        state |= behind(made, state, [torch.ones(2, 3, 4)], probes)
    assert not made.due(state, probes)
    for key in {"probe", "change", "drift"} & state.keys():
        for place in range(state[key].numel()):
            damaged = state[key].clone()
            damaged.view(-1)[place] = torch.nan
            assert made.due({**state, key: damaged}, probes), key


# worldcache


@dataclass
class Sheet:
    """The method as its sheet has it, in numpy and float64: a history of three computed steps, each sample by itself.

    Groups are by quantiles within a sample and a span, tokens slower than a thousandth of the rest count as straight,
    and one sample that drifts too far has all computed.
    """

    truth: Array
    stable: float = 0.3
    chaotic: float = 0.6
    longest: int = 6
    threshold: float = 1.0
    warmup: int = 5
    mean: str = "all"
    spans: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        steps, batch, tokens, _ = self.truth.shape
        cuts = sorted({0, tokens, *itertools.chain(*self.spans)})
        parts = list(itertools.pairwise(cuts))
        self.computed: list[int] = []
        self.made, self.groups, self.drifts = [], [], []
        drift = np.zeros(batch)
        group = np.zeros((batch, tokens), int)
        for t in range(steps):
            full = t < self.warmup or t == steps - 1 or len(self.computed) < 3
            if full or bool((drift >= self.threshold).any()) or t - self.computed[-1] > self.longest:
                self.computed.append(t)
                self.made.append(self.truth[t])
                drift = np.zeros(batch)
                if len(self.computed) >= 3:
                    self._look(*self.computed[-3:])
                    group = np.concatenate([self._grouped(self.curvature[:, a:b]) for a, b in parts], 1)
            else:
                k, last = t - self.computed[-1], self.truth[self.computed[-1]]
                turning = k * self._slope(k)
                change = np.where(group == 2, 1, 0)[..., None] * turning
                change = change + np.where(group == 1, 1, 0)[..., None] * k * self.velocity
                self.made.append(last + change)
                before = (k - 1) * self._slope(k - 1) if k > 1 else 0 * turning
                each = self.curvature * np.linalg.norm(turning - before, axis=-1) * (group == 2)
                count = (group == 2).sum(1) if self.mean == "chaotic" else tokens
                drift = drift + each.sum(1) / count
            self.groups.append(group)
            self.drifts.append(drift)

    def _look(self, s0: int, s1: int, s2: int) -> None:
        first, second, third = (self.truth[s] for s in (s0, s1, s2))
        self.before, self.velocity = (second - first) / (s1 - s0), (third - second) / (s2 - s1)
        bend = np.linalg.norm((self.velocity - self.before) / (s2 - s1), axis=-1)
        speed = (self.velocity**2).sum(-1)
        self.curvature = np.where(speed < 1e-6 * speed.mean(1, keepdims=True), 0, bend / (speed + 1e-8))

    def _grouped(self, curvature: Array) -> NDArray[np.int64]:
        low, high = np.quantile(curvature, [self.stable, self.chaotic], axis=1, keepdims=True)
        found: NDArray[np.int64] = (curvature >= low).astype(int) + (curvature >= high).astype(int)
        return found

    def _slope(self, k: int) -> Array:
        x = min(k / self.longest, 1)
        alpha = 3 * x**2 - 2 * x**3
        found: Array = (1 - alpha) * self.velocity + alpha * self.before
        return found


def wandering(seed: int, steps: int = 20, batch: int = 1, tokens: int = 11, channels: int = 4) -> list[list[Tensor]]:
    """Tokens on paths of all kinds, from straight to random."""
    generator = torch.Generator().manual_seed(seed)
    steady = torch.randn(1, batch, tokens, channels, generator=generator)
    jumps = torch.randn(steps, batch, tokens, channels, generator=generator)
    loose = torch.linspace(0.02, 1.0, tokens)[:, None]
    return [[feature] for feature in (steady + loose * jumps).cumsum(0)]


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    batch=st.sampled_from([1, 3]),
    mean=st.sampled_from(["all", "chaotic"]),
    spans=st.sampled_from([(), ((0, 4),), ((2, 5), (5, 9)), ((0, 6), (6, 11))]),
    longest=st.sampled_from([1, 3, 6]),
    threshold=st.sampled_from([0.3, 1.0, 8.0]),
    shares=st.sampled_from([(0.3, 0.6), (0.0, 0.0), (0.2, 0.8), (0.5, 1.0), (1.0, 1.0)]),
)
def test_worldcache_is_the_method_of_its_sheet(
    seed: int,
    batch: int,
    mean: str,
    spans: tuple[tuple[int, int], ...],
    longest: int,
    threshold: float,
    shares: tuple[float, float],
) -> None:
    features = wandering(seed, batch=batch)
    sheet = Sheet(
        np.stack([feature.double().numpy() for (feature,) in features]), *shares, longest, threshold, 4, mean, spans
    )
    groups = [f"span{i}:{start}..{stop}" for i, (start, stop) in enumerate(spans)]
    options = {"streak": longest, "threshold": threshold, "warmup": 4, "drift_mean": mean, "groups": groups}
    walk = Walk(policy("worldcache", stable=shares[0], chaotic=shares[1], **options), features)
    assert walk.computed == sheet.computed
    assert len(walk.computed) < 20
    for t, (made,) in enumerate(walk.made):
        if t >= 3:
            assert (walk.states[t]["group_0"].numpy() == sheet.groups[t]).all(), t
        # velocities are differences of values up to 10, each rounded to 6e-8 of them, and go up to 6 steps ahead
        np.testing.assert_allclose(made, sheet.made[t], rtol=0, atol=1e-4)
        np.testing.assert_allclose(walk.states[t]["drift"], sheet.drifts[t], rtol=1e-3, atol=1e-5)


def test_worldcache_computes_all_where_nothing_may_drift_or_nothing_may_be_predicted() -> None:
    features = wandering(0)
    for options in ({"threshold": 0.0}, {"streak": 0}, {"warmup": 20}):
        assert Walk(policy("worldcache", **options), features).computed == list(range(20))
    assert Walk(policy("worldcache", warmup=1), features).computed[:3] == [0, 1, 2]  # of which velocities come


@pytest.mark.parametrize("factor", [0.125, 1024.0])
def test_groups_and_decisions_have_no_unit(factor: float) -> None:
    features = wandering(1, batch=2)
    once = Walk(policy("worldcache", threshold=0.7), features)
    scaled = Walk(policy("worldcache", threshold=0.7), [[factor * f[0]] for f in features])
    assert 5 < len(once.computed) < 20
    assert once.computed == scaled.computed
    for a, b in zip(once.states, scaled.states, strict=True):
        assert torch.equal(a["group_0"], b["group_0"])
        # but for the 1e-8 beside a squared speed of 1 at least, a sixty-fourth of it here
        torch.testing.assert_close(a["drift"], b["drift"], rtol=1e-5, atol=0)


def planted() -> list[Tensor]:
    """Twelve steps of four tokens that stand, three on nearly straight paths, and three that turn on the spot."""
    time = torch.arange(12.0)
    found = torch.zeros(12, 1, 10, 2)
    for token in range(4):
        found[:, 0, token] = torch.tensor([1.0 + token, 2.0])
    for token in range(3):
        found[:, 0, 4 + token, 0] = time
        found[:, 0, 4 + token, 1] = 2.0**-14 * (1 + token) * time**2
        found[:, 0, 7 + token, 0] = torch.sin((1.0 + 0.3 * token) * time)
        found[:, 0, 7 + token, 1] = torch.cos((1.0 + 0.3 * token) * time)
    return list(found)


def test_planted_tokens_are_sorted_and_predicted_by_what_they_do() -> None:
    features = planted()
    # 10 tokens: between the fourth and the fifth, between the seventh and the eighth
    made = policy("worldcache", stable=3.5 / 9, chaotic=6.5 / 9, threshold=1e9)
    walk = Walk(made, [[feature] for feature in features])
    assert walk.computed == [0, 1, 2, 3, 4, 11]
    assert walk.states[4]["group_0"].tolist() == [[0] * 4 + [1] * 3 + [2] * 3]
    for t in range(5, 11):
        (found,) = walk.made[t]
        assert torch.equal(found[:, :4], features[t][:, :4])
        # as far as their bend of 2 ** -13 takes them, all of which a straight line misses
        bend = 2.0**-14 * 3 * ((t - 4) ** 2 + (t - 4))
        torch.testing.assert_close(found[:, 4:7], features[t][:, 4:7], rtol=0, atol=bend + 1e-5)
        assert float((found[:, 7:] - features[4][:, 7:]).norm(dim=-1).max()) > 0.1


def test_straight_paths_are_exact_though_all_of_them_count_as_turning() -> None:
    features = powers([whole(2, 6, 4), whole(2, 6, 4, seed=1)], 20)
    walk = Walk(policy("worldcache"), features)
    assert walk.computed == [0, 1, 2, 3, 4, 11, 18, 19]
    # all curvatures are nothing, and so the quantiles
    assert walk.states[4]["group_0"].eq(2).all()
    # (1 - share) * v + share * v is rounded once where a share is no binary fraction, then goes up to 6 steps of 8
    worst = max(float((a[0] - b[0]).abs().max()) for a, b in zip(walk.made, features, strict=True))
    assert worst <= 2.0**-24 * 2 * 6 * 8 * 2
    assert not any(state["drift"].any() for state in walk.states)


def test_a_turning_token_goes_from_its_last_velocity_to_the_one_before() -> None:
    made = policy("worldcache", streak=4)
    assert isinstance(made, WorldCache)
    now, before = torch.randn(1, 3, 2), torch.randn(1, 3, 2)
    state = begun(made, [torch.zeros(1, 3, 2)], (), 50)
    state |= {"velocity_0": now, "turn_0": before - now, "group_0": torch.full((1, 3), 2.0)}
    for k, share in ((0, 0.0), (1, 5 / 32), (2, 0.5), (3, 27 / 32), (4, 1.0), (9, 1.0)):
        counter(state, SINCE)[:] = k
        expected = k * (now * (1 - share) + before * share)
        torch.testing.assert_close(made.predict(state)[0], expected, rtol=0, atol=2.0**-24 * 9 * 4 * 4)


@given(st.integers(0, 10_000))
def test_no_prediction_leaves_what_its_velocities_span(seed: int) -> None:
    walk = Walk(policy("worldcache", threshold=1e9, stable=0.1, chaotic=0.3), wandering(seed))
    for t, (found,) in enumerate(walk.made):
        if t in walk.computed:
            continue
        state = walk.states[t]
        k = t - max(step for step in walk.computed if step < t)
        before = state["velocity_0"] + state["turn_0"]
        fastest = torch.maximum(state["velocity_0"].norm(dim=-1), before.norm(dim=-1))
        moved = (found - state["feature_0"]).norm(dim=-1)
        assert (moved <= k * fastest * (1 + 1e-5)).all()


def test_a_token_that_only_trembles_is_not_turning(monkeypatch: pytest.MonkeyPatch) -> None:
    features = planted()
    trembling = numbers(3, 12, 1, 4, 2) * 1e-6
    for feature, noise in zip(features, trembling, strict=True):
        feature[:, :4] += noise
    made = policy("worldcache", stable=3.5 / 9, chaotic=6.5 / 9)
    walk = Walk(made, [[feature] for feature in features])
    assert walk.states[4]["group_0"].tolist() == [[0] * 4 + [1] * 3 + [2] * 3]
    monkeypatch.setattr(worldcache, "STILL", 0.0)
    assert (Walk(made, [[feature] for feature in features]).states[4]["group_0"][0, :4] == 2).any()


def test_samples_of_a_batch_are_sorted_each_by_itself() -> None:
    features = wandering(5, batch=3)
    together = Walk(policy("worldcache", threshold=1e9), features)
    for sample in range(3):
        alone = Walk(policy("worldcache", threshold=1e9), [[f[0][sample : sample + 1]] for f in features])
        for a, b in zip(together.made, alone.made, strict=True):
            assert torch.equal(a[0][sample : sample + 1], b[0])
    lone = [Walk(policy("worldcache"), [[f[0][s : s + 1]] for f in features]).computed for s in range(3)]
    first = min(next(t for t in computed if t > 4) for computed in lone)
    assert next(t for t in Walk(policy("worldcache"), features).computed if t > 4) == first


@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 4, 2, 3), (2, 5, 4, 2, 3)])
def test_tokens_of_images_and_videos_are_their_pixels(shape: tuple[int, ...]) -> None:
    feature = torch.randn(shape)
    tokens = apart(feature)
    assert tokens.shape == (2, feature.numel() // 8, 4)
    number = torch.arange(float(tokens.shape[1])).expand(2, -1)
    spread = like(number, feature)
    # what one value a token scales is scaled alike in both forms
    torch.testing.assert_close(apart(feature * spread), tokens * number[..., None])
    walk = Walk(
        policy("worldcache", threshold=1e9), [[f[0].view(shape)] for f in wandering(2, 12, 2, 1, feature[0].numel())]
    )
    assert walk.made[6][0].shape == shape


def test_several_features_are_sorted_apart_and_drift_together() -> None:
    first, second = wandering(7), wandering(8, tokens=5)
    both = Walk(policy("worldcache", threshold=1e9), [[a[0], b[0]] for a, b in zip(first, second, strict=True)])
    alone = [Walk(policy("worldcache", threshold=1e9), features) for features in (first, second)]
    for t in range(20):
        for found, expected in zip(both.made[t], alone, strict=True):
            assert torch.equal(found, expected.made[t][0])
        drift = sum(float(walk.states[t]["drift"]) for walk in alone)
        assert float(both.states[t]["drift"]) == pytest.approx(drift, rel=1e-5)


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12), st.floats(0, 1))
def test_quantiles_are_those_of_numpy(values: list[float], share: float) -> None:
    ordered = torch.tensor([sorted(values)])
    expected = np.quantile(np.array(sorted(values)), share)
    # one interpolation in float32
    assert abs(float(quantile(ordered, share)) - expected) <= 2.0**-22 * 10


def test_spans_beyond_the_tokens_are_refused() -> None:
    made = policy("worldcache", groups=["image:0..6", "text:6..9"])
    with pytest.raises(
        Refused, match=r"\[groups\] groups has text:6..9, and what is predicted has 8 tokens; name spans"
    ):
        made.start([torch.zeros(1, 8, 4)], ())
    # of two streams one may be the shorter
    made.start([torch.zeros(1, 8, 4), torch.zeros(1, 9, 4)], ())


# options


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("policy=lru", "policy=lru is none of first-block, interval, taylorseer, teacache, worldcache"),
        ("policy=interval,threshold=1", "policy interval has no option threshold"),
        ("order=1", "policy worldcache has no option order"),
        ("policy=teacache,stable=0.5", "policy teacache has no option stable"),
        ("region=middle", "region=middle is neither blocks, output nor a range such as 2:10"),
        ("region=1:2:3", "region=1:2:3 is neither blocks, output nor a range such as 2:10"),
        ("form=loop", "form='loop': Input should be 'branch' or 'split'"),
        ("stable=0.7", "stable=0.7 lies above chaotic=0.6"),
        ("groups=[image]", "'image' is no span of tokens such as image:0..64"),
        ("groups=[image:8..8]", "'image:8..8' is no span of tokens such as image:0..64"),
        ("groups=[:0..8]", "':0..8' is no span of tokens such as image:0..64"),
        ("groups=[b:8..16,a:0..9]", "groups a:0..9 and b:8..16 overlap"),
        ("threshold=-0.1", "threshold: Input should be greater than or equal to 0"),
        ("warmup=0", "warmup: Input should be greater than or equal to 1"),
        ("policy=taylorseer,order=5", "order: Input should be less than or equal to 4"),
        ("policy=taylorseer,basis=fourier", "basis='fourier': Input should be 'newton' or 'taylor'"),
    ],
)
def test_an_option_that_does_not_fit_is_told(options: str, sentence: str) -> None:
    with pytest.raises(OptpassError) as raised:
        parse(f"cache({options})")
    assert str(raised.value) == f"[option-value] cache: {sentence}; see optpass passes cache"


def test_options_reach_the_policy() -> None:
    (made,) = parse("cache(policy=taylorseer,order=3,basis=taylor,streak=7)")
    found = made.options.chosen()
    assert (found.name, found.options.model_dump()) == (
        "taylorseer", {"warmup": 3, "streak": 7, "order": 3, "basis": "taylor"}
    )  # fmt: skip
    (made,) = parse("cache(groups=[a:0..8,b:8..16],stable=0.1)")
    assert made.options.chosen().options.groups == ["a:0..8", "b:8..16"]
    assert made.options.chosen().options.threshold == 1.0


class Text(nn.Module):
    """One causal attention over ids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out, self.head = nn.Embedding(32, 16), nn.Linear(16, 16), nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = x.unsqueeze(1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True).squeeze(1))
        found: Tensor = self.head(x)
        return found


def test_a_policy_on_a_causal_language_model_is_refused() -> None:
    ids = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))
    text = capture((Text().eval(), (), {"ids": ids}), dynamic=["ids:0=batch:1..4", "ids:1=tokens:2..64"])
    (record,) = apply(text, parse("cache(policy=interval,warmup=2)")).records
    assert record.status == "refused"
    what = "this is a causal language model, and cache has policy, warmup for denoisers alone"
    assert record.reason == f"[cache-options] {what}; leave the options out"


# engines, step by step

LOWERED = {"branch": ("onnxruntime", "openvino"), "split": ("onnxruntime",)}
ENGINES = {
    "taylorseer": ("policy=taylorseer,streak=2", True, "openvino"),
    "teacache": ("policy=teacache,threshold=0.1", False, "onnxruntime"),
}
"""Options, whether the batch is dynamic, and a backend; worldcache is held as an artifact."""

FORMS = ("branch", "split")
LABEL = example()["label"].numpy()


@functools.cache
def course() -> list[tuple[NDArray[np.float32], float]]:
    """Samples and times of a run that computes all."""
    way = asked(SAMPLER).start(50)
    run = session([program().main]).begin(50)
    found = [np.random.default_rng(0).standard_normal((2, 2, 8, 8)).astype(np.float32)]
    for index, time in enumerate(way.timesteps):
        found.append(way.step(index, run.step(found[-1], float(time), label=LABEL), found[-1]))
    return list(zip(found, map(float, way.timesteps), strict=False))


def check(runs: Mapping[str, Run], reference: Run, exact: Sequence[str] = ()) -> None:
    """Hold each step to that of a reference: to rounding, or exactly."""
    for sample, time in course():
        expected = reference.step(sample, time, label=LABEL)
        for name, run in runs.items():
            found = run.step(sample, time, label=LABEL)
            limit = 0.0 if name in exact else 1e-5 * float(np.abs(expected).max())
            assert float(np.abs(found - expected).max()) <= limit, (name, time)
    for name, run in runs.items():
        assert run.taken == reference.taken, name
    assert not reference.taken.damaged


def check_all(engines: Mapping[str, Denoiser], dense: Mapping[str, Denoiser], made: str) -> None:
    """Every engine as its policy says, and with nothing predicted as the model.

    Args:
        engines: by backend and form.
        dense: by backend.
        made: the options of the pass.
    """
    reference = session(stages(f"{made},form=branch")).begin(50)
    check({name: engine.begin(50) for name, engine in engines.items()}, reference)
    assert 10 <= len(reference.taken.computed) <= 40
    assert reference.taken.computed[-1] == 49
    knob: dict[str, Any] = {"threshold": 0.0} if "threshold" in reference._initial else {"streak": 0}
    for backend, computing in dense.items():
        runs = {name: engine.begin(50, **knob) for name, engine in engines.items() if name.startswith(backend)}
        # engines round otherwise where what a graph returns is more
        check(runs, computing.begin(50), exact=["eager split"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("options", "computed"),
    [
        ("policy=interval,warmup=1,streak=3", [0, 4, 8, 11]),
        ("policy=interval,warmup=5,streak=9", [0, 1, 2, 3, 4, 11]),
        ("policy=interval,warmup=1,streak=0", [*range(12)]),
        ("policy=interval,warmup=1,streak=9999999999", [0, 11]),
        # velocities come of three steps
        ("policy=worldcache,warmup=1,streak=2,threshold=1e9", [0, 1, 2, 5, 8, 11]),
    ],
)
def test_what_is_counted_says_which_steps_are_computed(options: str, computed: list[int], form: str) -> None:
    run = session(stages(f"{options},form={form}")).begin(12)
    for sample, time in course()[:12]:
        run.step(sample, time, label=LABEL)
    assert run.taken.computed == computed


def test_drift_is_known_before_the_step_that_it_has_computed() -> None:
    model = session(stages("policy=worldcache,streak=40,threshold=0.5"))
    run = model.begin(50)
    for sample, time in course():
        run.step(sample, time, label=LABEL)
    computed = run.taken.computed
    gaps = {b - a for a, b in itertools.pairwise(computed[5:-1])}
    assert len(gaps) > 1  # drift says when, not a streak
    assert isinstance(model.full, Eager)
    assert isinstance(model.opened, Eager)
    assert (model.full.calls, model.opened.calls) == (len(computed), 50 - len(computed))


@pytest.mark.parametrize("options", ["policy=interval", "policy=teacache", "policy=taylorseer,order=1,recompute=0.5"])
def test_the_form_is_chosen_by_what_a_refused_step_costs(options: str) -> None:
    names = [stage.name for stage in stages(options)]
    assert names == (["full", "reuse"] if options == "policy=interval" else ["steered"])


@pytest.mark.parametrize("name", ENGINES)
def test_engines_of_both_forms_take_the_steps_of_eager_execution(name: str, tmp_path: Path) -> None:
    options, dynamic, backend = ENGINES[name]
    made = {form: stages(f"{options},form={form}", dynamic=dynamic) for form in FORMS}
    with artifact.writer(tmp_path / "engine", sampler=SAMPLER) as new:
        engines, dense = {}, {}
        for form, each in made.items():
            opened = new.session([new.add(stage, backend, "f32") for stage in each][-1], threads=1)
            assert isinstance(opened, Denoiser)
            engines[f"{backend} {form}"] = opened
        whole = new.session(new.add(program(dynamic=dynamic).main, backend, "f32", role="dense"), threads=1)
        assert isinstance(whole, Denoiser)
        dense[backend] = whole
        engines |= {f"eager {form}": session(each) for form, each in made.items()}
        dense["eager"] = session([program(dynamic=dynamic).main])
        check_all(engines, dense, options)


def test_an_engine_computes_where_the_change_of_one_sample_is_no_number(tmp_path: Path) -> None:
    reuse = stages("policy=first-block,form=split")[-1]
    with artifact.writer(tmp_path / "engine", sampler=SAMPLER) as new:
        engine = new.session(new.add(reuse, "onnxruntime", "f32"), threads=1)
        given = {spec.name: tensor.numpy().copy() for spec, tensor in zip(reuse.inputs, reuse.example, strict=True)}
        given["state_threshold"][:] = 1e9
        assert not engine.run(**given)["refused"]
        for sample in range(2):
            hurt = given["state_probe"].copy()
            hurt[sample, -1, -1] = np.nan
            results = engine.run(**{**given, "state_probe": hurt})
            assert results["refused"], sample
            assert not results["damaged"]


def test_optimized_artifacts_of_both_forms_take_the_steps_of_eager_execution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, dense = {}, {}
    for form, backends in LOWERED.items():
        result = optpass.optimize(
            (Small(depth=3).eval(), (), example()), f"cache(form={form})", backend=backends, out=tmp_path / form,
            seconds=0, sampler=SAMPLER,
        )  # fmt: skip
        assert result.ok
        assert len(result.metric) == len(backends)
        for figure in result.metric:
            assert figure.name == "ssim"
            assert "steps computed" in figure.label
        for backend in backends:
            opened = optpass.load(tmp_path / form, backend=backend, threads=1)
            assert isinstance(opened, Denoiser)
            assert opened.keeps
            engines[f"{backend} {form}"] = opened
            whole = optpass.load(tmp_path / form, engine=f"dense/{backend}-f32", threads=1)
            assert isinstance(whole, Denoiser)
            assert not whole.keeps
            dense[backend] = whole
    assert {engine.engine.stage for engine in engines.values()} == {"steered", "reuse"}
    threads: list[int] = []
    monkeypatch.setattr(runtime, "open_engine", lambda *given: (threads.append(given[-1]), open_engine(*given))[1])
    optpass.load(tmp_path / "split", backend="onnxruntime", threads=2)
    assert threads == [1, 2]  # of the one that predicts, and the one that computes
    check_all(engines, dense, "policy=worldcache")


@pytest.mark.parametrize("reduction", ["merge(r=2,at=1)", "prune(keep=0.5,at=2,selector=norm)"])
def test_features_of_a_model_with_fewer_tokens_are_kept(reduction: str, tmp_path: Path) -> None:
    outcome = apply(program(), parse(f"cache(policy=taylorseer,order=1),{reduction}"))
    assert [record.status for record in outcome.records] == ["kept", "kept"]
    assert outcome.records[1].name == "cache"
    reduced = outcome.program.main
    assert not torch.allclose(reduced.results[0], program().main.results[0], atol=1e-2)
    with artifact.writer(tmp_path / "engine", sampler=SAMPLER) as new:
        added = [new.add(stage, "onnxruntime", "f32") for stage in outcome.program.deployed]
        engine = new.session(added[-1], threads=1)
        assert isinstance(engine, Denoiser)
        runs = engine.begin(10), session(outcome.program.deployed).begin(10), session([reduced]).begin(10)
        for step, (sample, time) in enumerate(course()[::5]):
            found, eager, computed = (run.step(sample, time, label=LABEL) for run in runs)
            np.testing.assert_allclose(found, eager, rtol=0, atol=1e-5 * float(np.abs(eager).max()))
            assert np.allclose(eager, computed, rtol=0, atol=1e-5) == (step in runs[1].taken.computed)
    assert runs[0].taken.computed == runs[1].taken.computed == [0, 1, 2, 6, 9]
