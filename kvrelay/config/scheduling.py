"""The sections of the config for scheduling: ``scheduler`` with its reserve policies, and ``speculative``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from kvrelay.config.base import Section, refuse


class NewTokenRatioConfig(Section):
    """Reserve policy new_token_ratio: keep blocks for a share of the tokens each running request may still generate."""

    init: float = Field(0.7, ge=0, le=1, description="Ratio at start and when the node becomes idle.")
    min: float = Field(0.1, ge=0, le=1, description="Minimum ratio.")
    decay: float = Field(0.001, ge=0, le=1, description="Decrease of the ratio per step.")
    clip_max_new_tokens: int = Field(
        4096, ge=1, le=1 << 22, description="Maximum remaining tokens counted per request."
    )

    @model_validator(mode="after")
    def _min_below_init(self) -> Self:
        if self.min > self.init:
            raise refuse(f"{self.min} is above init ({self.init}): the ratio falls from init to min", "min")
        return self


class FixedBlocksConfig(Section):
    """Reserve policy fixed_blocks: keep a number of blocks per running request, which decreases with each step."""

    blocks: int = Field(16, ge=0, le=1 << 20, description="Blocks per running request at start and after a preemption.")
    decay: float = Field(0.025, ge=0, le=1 << 20, description="Decrease of that number per step.")
    min_blocks: int = Field(0, ge=0, le=1 << 20, description="Minimum blocks per running request.")

    @model_validator(mode="after")
    def _min_below_blocks(self) -> Self:
        if self.min_blocks > self.blocks:
            raise refuse(
                f"{self.min_blocks} is above blocks ({self.blocks}): the reserve falls from blocks to min_blocks",
                "min_blocks",
            )
        return self


class SGLangReserveConfig(Section):
    """Reserve policy sglang: a new prompt needs room for its clipped output, each decode for a falling share of it."""

    init: float = Field(0.7, ge=0, le=1, description="Share at start and when the node becomes idle.")
    min_factor: float = Field(0.14, ge=0, le=1, description="The minimum share is min_factor * init.")
    decay_steps: int = Field(600, ge=1, le=1 << 30, description="Decode steps from init to the minimum share.")
    retract_decode_steps: int = Field(
        20, ge=1, le=1 << 20, description="A preemption frees room for this many tokens of every remaining decode."
    )
    clip_max_new_tokens: int = Field(
        4096, ge=1, le=1 << 22, description="Maximum remaining tokens counted per request."
    )


class SchedulerConfig(Section):
    """The batch of a step, the blocks kept free for running requests, and preemption."""

    max_num_batched_tokens: int = Field(2048, ge=1, le=1 << 22, description="Token budget of one step.")
    max_num_seqs: int = Field(64, ge=1, le=65536, description="Maximum requests that run on a node at once.")
    prefill_policy: Literal["dedicated", "shared"] = Field(
        "dedicated", description="Scheduler of prefill nodes; shared: with the decode reserve, for comparison."
    )
    prefill_order: Literal["fifo", "shortest_first"] = Field(
        "shortest_first",
        description="Order of prompts; shortest_first: the prompt with the fewest tokens still to compute (without "
        "cached tokens) is first.",
    )
    prefill_overtake_tokens: int = Field(
        16384,
        ge=0,
        le=1 << 30,
        description="Bound of shortest_first: at most this many prompt tokens that arrived later are computed before a "
        "prompt (on decode nodes, reservations count too); max_num_batched_tokens or less gives the order of arrival.",
    )
    reserve_policy: Literal["new_token_ratio", "fixed_blocks", "sglang", "none"] = Field(
        "new_token_ratio", description="Blocks kept free for running requests when a request is admitted."
    )
    new_token_ratio: NewTokenRatioConfig = Field(default_factory=NewTokenRatioConfig)
    fixed_blocks: FixedBlocksConfig = Field(default_factory=FixedBlocksConfig)
    sglang: SGLangReserveConfig = Field(default_factory=SGLangReserveConfig)
    watermark: float = Field(
        0.01, ge=0, lt=1, description="Share of the pool that stays free when a request is admitted."
    )
    preemption_order: Literal["latest_first", "shortest_output_first"] = Field(
        "latest_first", description="Which decode is preempted first."
    )
    requeue: Literal["front", "tail"] = Field(
        "front", description="Position of a preempted request among those of its priority."
    )
    enable_priority_scheduling: bool = Field(
        False,
        description="Admit by priority (lower first); a prompt with a higher priority may preempt a decode.",
    )
    priority_aging_s: float = Field(
        10.0, gt=0, le=86400, description="Seconds of waiting that raise a request by one priority level."
    )


class SpeculativeConfig(Section):
    """Speculative decoding: drafts are verified in one step. The output equals that without drafts."""

    method: Literal["none", "naive", "ngram"] = Field(
        "none", description="naive: speculative path without drafts; ngram: drafts from the tokens so far."
    )
    num_speculative_tokens: int = Field(4, ge=1, le=64, description="Maximum drafts per request and step.")
    ngram_min: int = Field(2, ge=1, le=64, description="Minimum length of an n-gram.")
    ngram_max: int = Field(4, ge=1, le=64, description="Maximum length of an n-gram.")

    @model_validator(mode="after")
    def _min_below_max(self) -> Self:
        if self.ngram_min > self.ngram_max:
            raise refuse(f"{self.ngram_min} is above ngram_max ({self.ngram_max})", "ngram_min")
        return self
