"""Residual branches scaled so that the size of one update does not depend on the depth.

    pre: α x + β F(N(x)),    post: N(α x + β F(x)),    none: α x + β F(x)

Source: https://kexue.fm/archives/8994 (为什么需要残差？一个来自DeepNet的视角), https://arxiv.org/abs/2203.00555.
"""

from kexue.nn.residual.block import Residual

__all__ = ["Residual"]
