"""DINO's training step as published (facebookresearch/dino), in plain torch, to measure opsin's step against.

    PYTHONPATH=src python benchmarks/published_dino.py      a hundred small steps on one repeated batch

It does what the published code does where that costs time or memory: attention weights written out, one head call
on all views, a loop over pairs of views, gradients clipped tensor by tensor with a number read back for each, and
a loop over parameters for the teacher. `bf16` is torch.autocast around both networks and the loss, as published
for fp16; on the CPU it leaves the student's log-softmax in bf16, on CUDA it computes it in float32.
One process only, hence no reduction over ranks; no gradient scaler, which bf16 does not need.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")

# B images, V views, N tokens with the class token, D width, H heads, K prototypes, P patches


class DropPath(nn.Module):
    """Whole samples of a residual branch set to zero while training; the rest is scaled up to keep the mean."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        kept = torch.rand(len(x), 1, 1, dtype=x.dtype, device=x.device) < keep  # [B, 1, 1]
        return x / keep * kept


class Attention(nn.Module):
    """Self-attention with explicit weights; gives them too, as the published code does."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # [B, H, N, D/H]
        weights = ((q @ k.transpose(2, 3)) * (D // self.heads) ** -0.5).softmax(dim=3)  # [B, H, N, N]
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, D)), weights


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a residual path."""

    def __init__(self, width: int, heads: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        # The weights live until the block ends, as in the published code.
        y, _weights = self.attention(self.norm1(x))
        x = x + self.drop_path(y)
        return cast("Tensor", x + self.drop_path(self.mlp(self.norm2(x))))


class ViT(nn.Module):
    """The class token [B, D] of images [B, 3, S, S], for any S of whole patches."""

    def __init__(self, image_px: int, patch_px: int, width: int, depth: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.patch_px = patch_px
        self.side = image_px // patch_px
        self.patches = nn.Conv2d(3, width, patch_px, stride=patch_px)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, width))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        _initialise_linears(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)  # [B, P, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # [B, N, D]
        x = x + self.positions(images.shape[2] // self.patch_px)
        for block in self.blocks:
            x = block(x)
        return cast("Tensor", self.norm(x)[:, 0])

    def positions(self, side: int) -> Tensor:
        """Position embedding [1, 1 + side^2, D], interpolated unless `side` is the learned one."""
        if side == self.side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, self.side, self.side, -1).permute(0, 3, 1, 2)  # [1, D, side, side]
        # The 0.1 keeps rounding from giving one patch too few; it also shifts the sampled points, as published.
        scale = (side + 0.1) / self.side
        resized = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        resized = resized.permute(0, 2, 3, 1).reshape(1, side * side, -1)
        return torch.cat([self.pos_embed[:, :1], resized], dim=1)


class Head(nn.Module):
    """Logits [B, K] of features [B, D]: three layers, L2 norm, prototypes of length 1."""

    def __init__(self, width: int, prototypes: int, hidden: int, bottleneck: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        _initialise_linears(self)
        self.last_layer = weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        length = cast("nn.Parameter", self.last_layer.get_parameter("parametrizations.weight.original0"))  # [K, 1]
        nn.init.ones_(length)
        length.requires_grad = False

    def forward(self, features: Tensor) -> Tensor:
        return cast("Tensor", self.last_layer(F.normalize(self.mlp(features), dim=1)))


class MultiCrop(nn.Module):
    """Logits [V B, K] of V views [B, 3, S, S]: one backbone call per run of equal sizes, one head call on all."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views: list[Tensor]) -> Tensor:
        sizes = torch.tensor([view.shape[3] for view in views])
        runs = torch.unique_consecutive(sizes, return_counts=True)[1].tolist()
        features = torch.empty(0, device=views[0].device)
        start = 0
        for run in runs:
            # Grown run by run, with the copies that makes, as published.
            features = torch.cat([features, self.backbone(torch.cat(views[start : start + run]))])
            start += run
        return cast("Tensor", self.head(features))


class PairLoss(nn.Module):
    """Cross-entropy between the views' distributions, and the center [1, K] that it moves after use."""

    center: Tensor

    def __init__(self, prototypes: int, student_temperature: float, center_momentum: float) -> None:
        super().__init__()
        self.student_temperature = student_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, prototypes))

    def forward(self, student: Tensor, teacher: Tensor, views: int, teacher_temperature: float) -> Tensor:
        """The mean over pairs of different views, of `student` [V B, K] and `teacher` [2 B, K]."""
        logits = (student / self.student_temperature).chunk(views)  # V of [B, K]
        targets = F.softmax((teacher - self.center) / teacher_temperature, dim=1).detach().chunk(2)  # 2 of [B, K]
        total = torch.zeros((), device=student.device)
        pairs = 0
        for i, target in enumerate(targets):
            for j in range(views):
                if i == j:
                    continue
                total = total + torch.sum(-target * F.log_softmax(logits[j], dim=1), dim=1).mean()
                pairs += 1
        self.update_center(teacher)
        return total / pairs

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        """The center moved towards the mean of the raw logits [2 B, K]."""
        mean = teacher.sum(dim=0, keepdim=True) / len(teacher)  # [1, K]
        self.center = self.center * self.center_momentum + mean * (1 - self.center_momentum)


@dataclass(frozen=True)
class StepSettings:
    """The values of the schedules at one step. `freeze_last_layer` is the first epoch."""

    lr: float = 5e-4
    weight_decay: float = 0.04
    momentum: float = 0.996
    teacher_temperature: float = 0.04
    freeze_last_layer: bool = False


_DEFAULT_SETTINGS = StepSettings()


class PublishedDino:
    """Student, teacher, optimizer and center; `step` does one update of them all.

    The defaults are ViT-S/16 and the published head.
    """

    def __init__(
        self,
        image_px: int = 224,
        patch_px: int = 16,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        *,
        prototypes: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        drop_path: float = 0.0,
        clip: float = 3.0,
        precision: Precision = "fp32",
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)

        def network(drop_path: float) -> MultiCrop:
            backbone = ViT(image_px, patch_px, width, depth, heads, drop_path)
            return MultiCrop(backbone, Head(width, prototypes, hidden, bottleneck))

        self.device = torch.device(device)
        self.clip = clip
        self.precision = precision
        self.student = network(drop_path).to(self.device)
        self.teacher = network(0.0).to(self.device)
        self.teacher.load_state_dict(copy.deepcopy(self.student.state_dict()))
        self.teacher.requires_grad_(False)
        self.loss = PairLoss(prototypes, student_temperature=0.1, center_momentum=0.9).to(self.device)
        self.optimizer = torch.optim.AdamW(_parameter_groups(self.student))

    def step(self, views: list[Tensor], settings: StepSettings = _DEFAULT_SETTINGS) -> float:
        """The loss on `views`, each [B, 3, S, S] with the two global ones first, before the update it makes.

        Raises:
            FloatingPointError: the loss is not finite. The center has then moved already, as published.
        """
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = settings.lr
            if i == 0:
                group["weight_decay"] = settings.weight_decay
        views = [view.to(self.device, non_blocking=True) for view in views]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            teacher = self.teacher(views[:2])  # [2 B, K]
            student = self.student(views)  # [V B, K]
            loss = self.loss(student, teacher, len(views), settings.teacher_temperature)
        value = float(loss.item())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value}; a step needs a finite one: lower the learning rate")

        self.optimizer.zero_grad()
        loss.backward()
        clip_each(self.student, self.clip)
        if settings.freeze_last_layer:
            for name, parameter in self.student.named_parameters():
                if "last_layer" in name:
                    parameter.grad = None
        self.optimizer.step()
        with torch.no_grad():
            for new, old in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                old.mul_(settings.momentum).add_((1 - settings.momentum) * new.detach())
        return value


def clip_each(model: nn.Module, limit: float) -> list[float]:
    """Each gradient scaled in place to a norm of at most `limit`; the norms before that."""
    norms = []
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        norm = parameter.grad.norm(2)
        norms.append(norm.item())
        coefficient = limit / (norm + 1e-6)
        if coefficient < 1:
            parameter.grad.mul_(coefficient)
    return norms


def _parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def _initialise_linears(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def main() -> None:
    for precision in PRECISIONS:
        dino = PublishedDino(32, 8, 64, 2, 2, prototypes=256, hidden=128, bottleneck=32, precision=precision)
        generator = torch.Generator().manual_seed(0)
        scenes = torch.randn(16, 3, 4, 4, generator=generator)
        views = [F.interpolate(scenes, size=(px, px)) for px in (32, 32, 16, 16)]
        views = [view + 0.1 * torch.randn(view.shape, generator=generator) for view in views]
        # While the center still grows, it lifts the loss whatever the student does: let it settle first.
        settled = [dino.step(views, StepSettings(lr=0.0)) for _ in range(40)][-1]
        learned = [dino.step(views, StepSettings(lr=1e-4)) for _ in range(60)][-1]
        print(f"{precision}: loss {settled:.4f} with the center settled, {learned:.4f} after 60 steps on this batch")
        assert learned < settled


if __name__ == "__main__":
    main()
