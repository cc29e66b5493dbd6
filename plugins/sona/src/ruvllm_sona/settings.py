"""Settings of this plugin, ``[plugins.sona]``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class SonaSettings(BaseModel):
    """How the engine learns from feedback.

    Attributes:
        instant: change the adapter after the last norm while feedback is given, as a preview of what comes.
        instant_rank, instant_rate, trust_nats: of that preview (see `MicroLoRAConfig`).
        preview_kl: nats a token on anchor texts that it may add to what is published.
        background: learn through the whole network in idle time. Without it the preview is all there is.
        rank, learning_rate: of the adapter in every linear layer; one step of Adam for each feedback.
        average: what is published is the mean of the adapters after so many last steps.
        leash: weight of the divergence from the base model in that step, on the answer.
        text_leash: the same on a text that nobody rated, another in every step (see `leash_texts`); 0 is none.
        ewc: λ of EWC++, how firmly what was learned is held once it has been consolidated (see `Holding`); 0 is off.
        consolidate_every: learned answers from one consolidation to the next.
        saturation: how soon an answer that has become likelier is left alone, per nat.
        budget: nats that a whole answer may be away from the base model before the leash tightens.
        max_answer: tokens of an answer that are learned from, its first ones.
        remember: answers that feedback may still come for.
        keep_versions: published versions that can be rolled back to.
        max_patterns: adapters of one user for different kinds of prompts.
        specialise: when a kind of prompts gets its own (see `BankConfig`).
        abstain_below: prompts less alike to all that was rated get the base model; None is never.
        max_loss, max_kl: limits of the gate, nats a token on anchor texts (see `GateConfig`).
        anchors: a text file with more anchor texts, a paragraph each.
        feedback_per_minute, burst: how often one user's feedback may come.
        nats_per_hour, nats_per_day: how much one user's feedback may change, predicted nats of rated answers.
        drafts: learn to draft, for `speculative = "learned"`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    instant: bool = True
    instant_rank: int = Field(2, ge=1, le=2)
    instant_rate: float = Field(0.3, gt=0.0)
    trust_nats: float = Field(2.0, gt=0.0)
    preview_kl: float = Field(0.004, ge=0.0)
    background: bool = True
    rank: int = Field(1, ge=1, le=64)
    learning_rate: float = Field(3e-3, gt=0.0, le=1.0)
    average: int = Field(40, ge=1)
    leash: float = Field(0.07, ge=0.0)
    text_leash: float = Field(0.18, ge=0.0)
    ewc: float = Field(1.0, ge=0.0, le=1e6, allow_inf_nan=False)
    consolidate_every: int = Field(200, ge=1)
    saturation: float = Field(0.1, ge=0.0)
    budget: float = Field(float("inf"), gt=0.0)
    max_answer: int = Field(256, ge=1)
    remember: int = Field(1000, ge=1)
    keep_versions: int = Field(32, ge=1)
    max_patterns: int = Field(8, ge=1)
    specialise: Literal["contradiction", "always", "never"] = "contradiction"
    abstain_below: float | None = Field(None, ge=-1.0, le=1.0)
    max_loss: float = Field(0.02, ge=0.0)
    max_kl: float = Field(0.2, ge=0.0)
    anchors: Path | None = None
    feedback_per_minute: float = Field(60.0, gt=0.0)
    burst: int = Field(120, ge=1)
    nats_per_hour: float = Field(2000.0, gt=0.0)
    nats_per_day: float = Field(10000.0, gt=0.0)
    drafts: bool = True
