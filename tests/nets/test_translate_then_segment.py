from __future__ import annotations

import torch
from torch import nn

from medkd.nets.bilinear_unets import BilinearUNet
from medkd.nets.translate_then_segment import TranslateThenSegment
from medkd.nets.translators import ResNetGenerator


def network():
    torch.manual_seed(0)
    generator = ResNetGenerator(width=4, blocks=1, norm="batch")
    return TranslateThenSegment(generator, BilinearUNet(widths=(4, 8)))


def test_the_translation_is_what_gets_segmented():
    joined = network().eval()
    image = torch.randn(2, 1, 12, 16)
    torch.testing.assert_close(joined(image), joined.segmenter(joined.generator(image)), rtol=0, atol=0)


def test_the_generator_stays_in_eval_mode_and_unchanged_whatever_train_says():
    joined = network()
    before = {name: value.clone() for name, value in joined.generator.state_dict().items()}
    holder = nn.ModuleDict({"deployed": joined}).train()
    joined(torch.randn(2, 1, 12, 16))
    assert joined.segmenter.training
    assert not any(module.training for module in joined.generator.modules())
    assert all(torch.equal(value, before[name]) for name, value in joined.generator.state_dict().items())
    holder.eval()
    assert not joined.segmenter.training


def test_only_the_segmenter_learns():
    joined = network().train()
    joined(torch.randn(2, 1, 12, 16)).square().mean().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in joined.generator.parameters())
    assert all(parameter.grad is not None for parameter in joined.segmenter.parameters())


def test_script_and_export_of_both_networks_compute_the_same(tmp_path):
    joined = network().eval()
    image = torch.randn(1, 1, 12, 18)
    torch.jit.save(torch.jit.script(joined), tmp_path / "joined.ts")
    torch.testing.assert_close(torch.jit.load(tmp_path / "joined.ts")(image), joined(image))
    torch.testing.assert_close(torch.export.export(joined, (image,)).module()(image), joined(image))
