"""Keep what was computed before: keys and values of a text, or features of a denoiser between its steps.

No cache of a model's own is used: the captured graph is rewritten, that of a causal model by ``optpass.stepping``, that
of a denoiser by ``optpass.reusing``, so that any model gets one. Papers: Attention Is All You Need, arXiv 1706.03762,
section 3.2.3 (what a causal mask allows); those of the policies for denoisers are named in their files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError, create_model, model_validator

from optpass import denoising, reusing, stepping
from optpass.causal import Causal
from optpass.errors import Refusal
from optpass.passes.base import Options, Staging
from optpass.passes.cache.policies import Policy, policies
from optpass.program import Stage
from optpass.reusing import Parts
from optpass.rewrite import Refused

DEFAULT = "worldcache"

RANGE = re.compile(r"\d*:\d*")


class _Options(Options):
    """What ``cache`` takes beside the options of its policies, all of it for denoisers.

    A causal language model needs nothing: its context is the largest length that it was captured for.
    """

    policy: str | None = Field(
        None,
        description=f"when a step of a denoiser is computed: {', '.join(sorted(policies()))}; {DEFAULT} by default",
    )
    region: str | None = Field(
        None,
        description="what is predicted: output, blocks (the stream behind them), or a range of blocks such as 2:10",
    )
    recompute: float = Field(
        0.0, ge=0, lt=1, description="share of the tokens, those that turn most, computed in a step that is predicted"
    )
    form: Literal["branch", "split"] | None = Field(
        None,
        description="one engine that decides in its graph (branch), or two between which the driver chooses; by "
        "default whichever is faster",
    )

    @model_validator(mode="after")
    def _check(self) -> _Options:
        if self.policy is not None and self.policy not in policies():
            raise ValueError(f"policy={self.policy} is none of {', '.join(sorted(policies()))}")
        if self.region is not None and self.region not in ("blocks", "output") and not RANGE.fullmatch(self.region):
            raise ValueError(f"region={self.region} is neither blocks, output nor a range such as 2:10")
        self.chosen()
        return self

    def chosen(self) -> Policy:
        """The policy with its options."""
        kind = policies()[self.policy or DEFAULT]
        own = {name: value for name, value in self if name not in _Options.model_fields and value is not None}
        unknown = sorted(set(own) - set(kind.options_type.model_fields))
        if unknown:
            raise ValueError(f"policy {kind.name} has no option {unknown[0]}")
        try:
            return kind(kind.options_type(**own))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"][:1])
            raise ValueError(f"{place}{': ' if place else ''}{first['msg'].removeprefix('Value error, ')}") from error


def _of_policies() -> dict[str, Any]:
    """The options of all policies, each left to its policy unless it is given."""
    found: dict[str, Any] = {}
    for name, kind in sorted(policies().items()):
        for key, field in kind.options_type.model_fields.items():
            text = field.description or ""
            known = found.get(key)
            said = f"{known[1].description} ({name})" if known and text != known[1].description else text
            annotation: Any = field.annotation
            found[key] = (annotation | None, Field(None, description=known[1].description if known else said))
    return found


CacheOptions: Any = create_model("CacheOptions", __base__=_Options, __doc__="Options of ``cache``.", **_of_policies())


class Cache(Staging):
    """Keep the keys and values of a causal language model, or features of a denoiser between steps."""

    name = "cache"
    after: ClassVar[Sequence[str]] = ("prune", "merge", "transform")
    options_type = CacheOptions
    identity: ClassVar[dict[str, Any]] = {}

    def step(self, causal: Causal) -> Stage:
        """Continue a text by some tokens, one after the other."""
        if self.options.model_dump(exclude_unset=True):
            given = ", ".join(self.options.model_dump(exclude_unset=True))
            what = f"this is a causal language model, and cache has {given} for denoisers alone"
            raise Refused(Refusal("cache-options", what, "leave the options out"))
        return stepping.step(causal)

    def denoiser(self, stage: Stage) -> tuple[Parts, list[Stage]]:
        """Predict features in steps that need not be computed."""
        policy, recompute = self.options.chosen(), self.options.recompute
        parts = Parts(denoising.cut(stage, policy, self.options.region), policy, recompute)
        # an engine that only predicts is faster, unless much is done before a step turns out to need computing
        form = "branch" if policy.probe or recompute else "split"
        return parts, reusing.stages(parts, self.options.form or form)
