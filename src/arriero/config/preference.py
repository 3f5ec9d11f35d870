"""Learning from pairs of answers of which one is preferred."""

from __future__ import annotations

from dataclasses import dataclass

from arriero.config.option import OptionGroup, option

SIMPO_BETA, BETA = 2.0, 0.1


@dataclass(kw_only=True)
class PreferenceOptions(OptionGroup):
    """Preference."""

    preference: str | None = option(
        None,
        "learn from pairs of answers (prompt, chosen, rejected) by this loss: dpo (sigmoid is the same), ipo, orpo, simpo; "
        "a row of a batch is a pair",
        ("dpo", "ipo", "orpo", "simpo", "sigmoid"),
        aliases=("loss_type",),
    )
    dpo_beta: float | None = option(
        None,
        "how strongly DPO and IPO hold to the model they start from, and the scale of SimPO's rewards "
        "(default: 0.1; simpo: 2)",
        aliases=("beta",),
        above=0.0,
        only_with="preference",
    )
    dpo_label_smoothing: float = option(
        0.0,
        "share of the pairs that DPO takes to be the wrong way round (cDPO)",
        minimum=0.0,
        below=0.5,
        only_with="preference",
    )
    simpo_gamma: float = option(
        1.0, "how much greater the chosen answer's reward is to be in SimPO", minimum=0.0, only_with="preference"
    )
    orpo_lambda: float = option(
        0.1, "weight of ORPO's odds ratio beside its cross-entropy", minimum=0.0, only_with="preference"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preference == "sigmoid":  # its name in TRL and PaddleNLP
            self.preference = "dpo"

    @property
    def beta(self) -> float:
        if self.dpo_beta is not None:
            return self.dpo_beta
        return SIMPO_BETA if self.preference == "simpo" else BETA
