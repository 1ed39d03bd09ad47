"""The losses by name: formula, source, and the keys that each reads. The docs show this table and tests hold it.

Notation: lp(y) is the sum of a response's token log-probs under the policy, L its number of tokens, w the chosen and l
the rejected response. u = lp(w) − lp_reference(w), v the same of l, d = u − v. β, ε, γ and τ are `loss.beta`,
`label_smoothing`, `simpo_gamma` and `discopop_tau`; σ is the sigmoid. Under another f-divergence than reverse KL, u and
v stand for its scores of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A loss: its formula, its value where policy = reference, and the keys of `loss.*` that it reads.

    `without_preference` is that value; None if it depends on the data, as it does without a reference. A loss that
    reads `f_divergence` may be used with other divergences than reverse KL, as in TRL; others may not, because f-DPO's
    rewards are only known up to a function of the prompt, so that one response's reward alone is unknown.
    `has_preference`: it compares the two responses. `raises_chosen`: it does not push the chosen response down.
    """

    formula: str
    without_preference: str | None
    knobs: tuple[str, ...]
    source: str
    needs_reference: bool = True
    has_preference: bool = True
    raises_chosen: bool = True


LOSSES: Mapping[str, LossSpec] = MappingProxyType(
    {
        "sigmoid": LossSpec(
            "−(1−ε) log σ(βd) − ε log σ(−βd)",
            "ln 2",
            ("beta", "label_smoothing", "f_divergence", "ld_alpha"),
            "DPO, Rafailov et al. 2023, eq. 7; ε > 0: cDPO, Mitchell 2023",
        ),
        "robust": LossSpec(
            "[−(1−ε) log σ(βd) + ε log σ(−βd)] / (1−2ε)",
            "ln 2",
            ("beta", "label_smoothing", "f_divergence", "ld_alpha"),
            "Robust DPO, Chowdhury et al. 2024",
        ),
        "ipo": LossSpec(
            "(u/L_w − v/L_l − 1/(2β))²; with `loss.ipo_length_normalize=false` (d − 1/(2β))²",
            "(1/(2β))²",
            ("beta", "ipo_length_normalize", "f_divergence", "ld_alpha"),
            "Azar et al. 2023, eq. 17; per token as in TRL",
        ),
        "hinge": LossSpec(
            "max(0, 1 − βd)",
            "1",
            ("beta", "f_divergence", "ld_alpha"),
            "SLiC, Zhao et al. 2023; RSO, Liu et al. 2024",
        ),
        "sigmoid_norm": LossSpec(
            "−log σ(β(u/L_w − v/L_l))",
            "ln 2",
            ("beta", "f_divergence", "ld_alpha"),
            "Tülu 3, Lambert et al. 2024",
        ),
        "exo_pair": LossSpec(
            "σ(βd)·log(σ(βd)/(1−ε)) + σ(−βd)·log(σ(−βd)/ε), ε > 0",
            "−ln 2 − (ln(1−ε) + ln ε)/2",
            ("beta", "label_smoothing", "f_divergence", "ld_alpha"),
            "EXO, Ji et al. 2024, eq. 16",
        ),
        "nca_pair": LossSpec(
            "−log σ(βu) − (log σ(−βu) + log σ(−βv))/2",
            "2 ln 2",
            ("beta", "ld_alpha"),
            "NCA, Chen et al. 2024",
        ),
        "bco_pair": LossSpec(
            "−log σ(βu) − log σ(−βv)",
            "2 ln 2",
            ("beta", "ld_alpha"),
            "BCO, Jung et al. 2024, without the reward shift δ",
        ),
        "sppo_hard": LossSpec(
            "(u − 1/(2β))² + (v + 1/(2β))²",
            "2 (1/(2β))²",
            ("beta", "ld_alpha"),
            "SPPO, Wu et al. 2024, eq. 4.7, with P of 1 and 0",
        ),
        "apo_zero": LossSpec(
            "1 − σ(βu) + σ(βv)",
            "1",
            ("beta", "ld_alpha"),
            "APO, D'Oosterlinck et al. 2024, eq. 7",
        ),
        "apo_down": LossSpec(
            "σ(βu) + 1 − σ(βd)",
            "1",
            ("beta", "ld_alpha"),
            "APO, D'Oosterlinck et al. 2024, eq. 8",
            raises_chosen=False,
        ),
        "discopop": LossSpec(
            "−(1−m) log σ(βd) + m·exp(−βd), m = σ(βd/τ)",
            "(ln 2 + 1)/2",
            ("beta", "discopop_tau", "f_divergence", "ld_alpha"),
            "DiscoPOP, Lu et al. 2024, eq. 5",
        ),
        "simpo": LossSpec(
            "−(1−ε) log σ(x) − ε log σ(−x), x = β(lp(w)/L_w − lp(l)/L_l) − γ",
            None,
            ("beta", "label_smoothing", "simpo_gamma"),
            "SimPO, Meng et al. 2024, eq. 6; ε as in TRL's CPOTrainer",
            needs_reference=False,
        ),
        "orpo": LossSpec(
            "−a − β log σ(log odds(a) − log odds(b)), a = lp(w)/L_w, b = lp(l)/L_l, log odds(a) = a − log(1 − eᵃ)",
            None,
            ("beta",),
            "ORPO, Hong et al. 2024, eq. 4, 6 and 7, with λ = β",
            needs_reference=False,
        ),
        "sft": LossSpec(
            "−lp(w) · N_pairs/N_tokens: the mean over the chosen responses' tokens in the global batch",
            None,
            (),
            "the NLL term of RPO and MPO",
            needs_reference=False,
            has_preference=False,
        ),
    }
)

REFERENCE_FREE = frozenset(name for name, spec in LOSSES.items() if not spec.needs_reference)

_SORTS = (
    "it sorts the log-ratios of a batch, so that it is no sum over pairs: within microbatches its value depends on "
    "them, over the global batch no backward could start before the last forward"
)
# Losses of other trainers that are not offered here, and why.
NOT_OFFERED: Mapping[str, str] = MappingProxyType(
    {
        "aot": _SORTS,
        "aot_pair": _SORTS,
        "aot_unpaired": _SORTS,
        "wpo": "its weights need the sum of squared probabilities over the vocabulary at every response token, under "
        "the policy of each step, which the fused output layer does not compute",
    }
)


def needs_reference(names: Iterable[str]) -> bool:
    """True if a loss, or any in a mix, compares the policy with a reference."""
    return any(LOSSES[name].needs_reference for name in names)
