r"""ViT-S/16 pre-trained by MaPeT on the k-CLIP tokens of ImageNet-1k (paper, Tables 1, 2 and 8).

    mapet tokenize --images imagenet/train --tokenizer kclip --precision fp16 --output runs/imagenet_kclip
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
        -m mapet pretrain --recipe vit_small_kclip

Expect: 82.1 % top-1 after fine-tuning, 71.6 % by linear probe (the paper's numbers).
Cost: 32 V100 of 16 GB for about one day in the paper, 64 images per GPU and step. On fewer GPUs give --micro-batch:
the global batch stays what it is. The cache takes 193 GB for the pixels and 0.5 GB for the tokens.
The official code differs from the paper: it runs 10 more epochs at the smallest rate (optim.cooldown_epochs=10) and
changes the rate once per epoch (optim.schedule_per=epoch); its configuration file gives every process a batch of 2048.
"""

from pathlib import Path

from mapet.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from mapet.objectives import options


def config() -> RunConfig:
    """Table 8; what is not said here is a default of RunConfig, and Table 8 too. fp16 is the official code's."""
    return RunConfig(
        model=ModelConfig.preset("small"),
        objective=options("mapet", cut=50),
        data=DataConfig(cache=Path("runs/imagenet_kclip"), workers=8),
        optim=OptimConfig(epochs=300, global_batch=2048, lr=1.5e-3),
        train=TrainConfig(output=Path("runs/vit_small_kclip"), precision="fp16"),
    )
