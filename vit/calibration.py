"""Scores that mean what they say: the temperature that makes held-out labels most likely."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

TEMPERATURES = torch.logspace(-2, 3, 121, base=2.0)  # 0.25 to 8, each 3 % above the last
TIE = 1e-6  # what rounding makes of equal sums, as a share


class Temperature(Metric):
    """Best divisor of the logits (Guo et al. 2017, 1706.04599, section 4.2), found while validation goes by.

    Sums the negative log-likelihood at a ladder of temperatures, so that nothing but 243 numbers is kept, and sums
    over ranks are exact. ``compute`` gives the minimum, refined by the parabola through its neighbours.

    Counted is one image more, an average one that may be of any class: where few images are held out and all are
    right, the sharpest scores would be best, and the first mistake on another image would be made with certainty.
    """

    full_state_update = False
    nll: Tensor
    blind: Tensor  # the same, of labels drawn blindly
    count: Tensor  # images

    def __init__(self) -> None:
        super().__init__()
        for name in ("nll", "blind"):
            self.add_state(name, torch.zeros(len(TEMPERATURES), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add logits (B, classes) and their labels (B,)."""
        for i, temperature in enumerate(TEMPERATURES.tolist()):
            logs = (logits.float() / temperature).log_softmax(1)
            self.nll[i] += F.nll_loss(logs, labels, reduction="sum")
            self.blind[i] -= logs.mean(1).nan_to_num(nan=torch.nan, neginf=0.0).sum()  # -inf: a class ruled out
        self.count += len(labels)

    def compute(self) -> Tensor:
        """The temperature, in [0.25, 8]; of several that are as good, as of equal logits, that nearest to 1."""
        ladder = TEMPERATURES.to(self.nll.device, torch.float64).log2()
        nll = self.nll + self.blind / self.count.clamp_min(1)
        nll = nll.nan_to_num(nan=torch.inf, posinf=torch.inf)  # of weights that overflow
        good = (nll <= (1 + TIE) * nll.min() + TIE).nonzero()[:, 0]
        best = int(good[ladder[good].abs().argmin()])
        if best in (0, len(ladder) - 1):
            return ladder[best].exp2().float()
        left, middle, right = nll[best - 1 : best + 2]
        bend = left - 2 * middle + right
        shift = (0.5 * (left - right) / bend).clamp(-1, 1) if bend > TIE * middle else 0  # no bend: all are as good
        return (ladder[best] + shift * (ladder[1] - ladder[0])).exp2().float()
