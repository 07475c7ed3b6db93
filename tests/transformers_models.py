"""Tiny random models of every transformers family with deformable attention, from their configs: nothing is fetched."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
import transformers

from route_kernels.integrations.codebases.transformers import FAMILIES
from route_kernels.testing import perturb_sampling

every_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.skipif(missing, reason="this version of transformers does not have it"))
        for name in FAMILIES
        for missing in [find_spec(f"transformers.models.{name}") is None]
    ],
)


@dataclass(frozen=True)
class Example:
    """A family's smallest model, in float64 and training mode.

    Attributes:
        build: makes the model.
        inputs: makes the keyword arguments of a call.
        calls: how often a forward pass runs deformable attention.
    """

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[], dict]
    calls: int


def model_and_inputs(family: str, **config) -> tuple[torch.nn.Module, dict]:
    """The model of `EXAMPLES[family]` and its inputs; `config` overrides its settings.

    Weights are normal over the root of their fan-in: the families' own initialisation is so small that features vanish
    behind a few layers of few channels.
    """
    example = EXAMPLES[family]
    torch.manual_seed(0)
    model = example.build(**config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model, example.inputs()


def _images() -> dict:
    return {"pixel_values": torch.randn(2, 3, 64, 96, dtype=torch.float64)}


def _padded_images() -> dict:
    mask = torch.ones(2, 64, 96, dtype=torch.long)
    mask[1, :, 50:] = 0
    return {**_images(), "pixel_mask": mask}


def _images_and_text() -> dict:
    return {
        **_padded_images(),
        "input_ids": torch.tensor([[101, 7, 9, 1012, 11, 1012, 102]] * 2),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
    }


def _images_and_tasks() -> dict:
    return {**_padded_images(), "task_inputs": torch.randint(0, 99, (2, 77))}


def _images_classes_and_tasks() -> dict:
    return {
        **_images(),
        "classes_input_ids": torch.randint(3, 99, (4, 7)),
        "classes_attention_mask": torch.ones(4, 7, dtype=torch.long),
        "classes_structure": torch.tensor([2, 2]),
        "tasks_input_ids": torch.randint(3, 99, (2, 7)),
        "tasks_attention_mask": torch.ones(2, 7, dtype=torch.long),
    }


def _resnet() -> transformers.PreTrainedConfig:
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
    )


def _rt_detr_resnet() -> transformers.PreTrainedConfig:
    return transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _hgnet(stages: tuple[str, ...] = ("stage2", "stage3", "stage4")) -> transformers.PreTrainedConfig:
    return transformers.HGNetV2Config(
        embedding_size=8,
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 8, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 8, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        out_features=list(stages),
    )


def _swin(*stages: str) -> transformers.PreTrainedConfig:
    return transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=list(stages),
    )


def _bert() -> transformers.PreTrainedConfig:
    return transformers.BertConfig(
        vocab_size=1013,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )


_ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
    "encoder_n_points": 2,
    "decoder_n_points": 3,
}


def _deformable_detr(**config):
    two_stage = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 5}
    config = transformers.DeformableDetrConfig(backbone_config=_resnet(), **{**_ENCODER_DECODER, **two_stage, **config})
    return transformers.DeformableDetrForObjectDetection(config)


_REAL_TIME = {
    "d_model": 16,
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [8, 16, 16],
    "decoder_in_channels": [16, 16, 16],
    "encoder_layers": 1,
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_layers": 2,
    "decoder_ffn_dim": 16,
    "decoder_attention_heads": 2,
    "decoder_n_points": 2,
    "num_queries": 5,
    "hidden_expansion": 0.5,
}


def _rt_detr(**config):
    config = transformers.RTDetrConfig(backbone_config=_rt_detr_resnet(), **{**_REAL_TIME, **config})
    return transformers.RTDetrForObjectDetection(config)


def _rt_detr_v2(**config):
    config = transformers.RTDetrV2Config(backbone_config=_rt_detr_resnet(), **{**_REAL_TIME, **config})
    return transformers.RTDetrV2ForObjectDetection(config)


# Powers of two: these families keep 1 / P in float32, which is exact for them in float64, too.
_VARYING_POINTS = {"decoder_n_points": [4, 1, 2], "hidden_expansion": 1.0}


def _d_fine(**config):
    config = transformers.DFineConfig(backbone_config=_hgnet(), **{**_REAL_TIME, **_VARYING_POINTS, **config})
    return transformers.DFineForObjectDetection(config)


def _deimv2(**config):
    config = transformers.Deimv2Config(backbone_config=_hgnet(), **{**_REAL_TIME, **_VARYING_POINTS, **config})
    return transformers.Deimv2ForObjectDetection(config)


def _pp_doclayout_v2(**config):
    reading_order = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "max_position_embeddings": 16,
        "coordinate_size": 3,
        "shape_size": 2,
    }
    return _pp_doclayout("V2", reading_order_config=reading_order, class_thresholds=[0.5] * 2, class_order=[0, 1])(
        num_labels=2, **config
    )


def _pp_doclayout(version: str, stages: tuple[str, ...] = ("stage2", "stage3", "stage4"), **settings):
    def build(**config):
        config_class = getattr(transformers, f"PPDocLayout{version}Config")
        config = config_class(backbone_config=_hgnet(stages), **{**_REAL_TIME, **settings, **config})
        return getattr(transformers, f"PPDocLayout{version}ForObjectDetection")(config)

    return build


def _grounding(name: str):
    def build(**config):
        config = getattr(transformers, f"{name}Config")(
            backbone_config=_swin("stage2", "stage3", "stage4"),
            text_config=_bert(),
            max_text_len=16,
            **{**_ENCODER_DECODER, **config},
        )
        return getattr(transformers, f"{name}ForObjectDetection")(config)

    return build


def _omdet_turbo(**config):
    text = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2
    )
    config = transformers.OmDetTurboConfig(
        backbone_config=_swin("stage2", "stage3", "stage4"),
        text_config=text,
        apply_layernorm_after_vision_backbone=False,
        image_size=64,
        text_projection_in_dim=32,
        text_projection_out_dim=32,
        task_encoder_hidden_dim=16,
        class_embed_dim=32,
        num_queries=5,
        encoder_hidden_dim=16,
        vision_features_channels=[16, 16, 16],
        encoder_in_channels=[16, 32, 64],
        encoder_attention_heads=2,
        encoder_dim_feedforward=16,
        decoder_hidden_dim=16,
        decoder_num_heads=2,
        decoder_num_layers=2,
        decoder_dim_feedforward=16,
        decoder_num_points=2,
        **config,
    )
    model = transformers.OmDetTurboForObjectDetection(config)
    model.language_backbone.requires_grad_(False)  # its cache of embeddings outlives a graph
    return model


def _lw_detr(**config):
    vit = transformers.LwDetrViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        pretrain_image_size=64,
        patch_size=16,
        num_windows=4,
        window_block_indices=[0],
        out_indices=[1, 2],
    )
    config = transformers.LwDetrConfig(
        backbone_config=vit,
        projector_scale_factors=[1.0, 2.0],
        d_model=16,
        decoder_ffn_dim=16,
        decoder_n_points=2,
        decoder_layers=2,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        num_queries=5,
        group_detr=2,
        **config,
    )
    return transformers.LwDetrForObjectDetection(config)


def _rf_detr(**config):
    vit = transformers.RfDetrDinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        num_windows=2,
        out_indices=[1, 2],
    )
    config = transformers.RfDetrConfig(
        backbone_config=vit,
        d_model=16,
        decoder_ffn_dim=16,
        decoder_n_points=2,
        decoder_layers=2,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        num_queries=5,
        group_detr=2,
        **config,
    )
    return transformers.RfDetrForObjectDetection(config)


_UNIVERSAL = {
    "hidden_dim": 32,
    "encoder_feedforward_dim": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 2,
    "dim_feedforward": 16,
    "num_queries": 5,
}


def _mask2former(**config):
    config = transformers.Mask2FormerConfig(
        backbone_config=_swin("stage1", "stage2", "stage3", "stage4"),
        feature_size=32,
        mask_feature_size=32,
        **{**_UNIVERSAL, **config},
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def _oneformer(**config):
    config = transformers.OneFormerConfig(
        backbone_config=_swin("stage1", "stage2", "stage3", "stage4"),
        text_encoder_width=32,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=99,
        conv_dim=32,
        mask_dim=32,
        query_dec_layers=1,
        **{**_UNIVERSAL, **config},
    )
    return transformers.OneFormerForUniversalSegmentation(config)


EXAMPLES = {
    "deformable_detr": Example(_deformable_detr, _padded_images, calls=4),
    "rt_detr": Example(_rt_detr, _images, calls=2),
    "grounding_dino": Example(_grounding("GroundingDino"), _images_and_text, calls=4),
    "mm_grounding_dino": Example(_grounding("MMGroundingDino"), _images_and_text, calls=4),
    "omdet_turbo": Example(_omdet_turbo, _images_classes_and_tasks, calls=2),
    "lw_detr": Example(_lw_detr, _padded_images, calls=2),
    "rf_detr": Example(_rf_detr, _padded_images, calls=2),
    "pp_doclayout_v2": Example(_pp_doclayout_v2, _images, calls=2),
    "pp_doclayout_v3": Example(
        _pp_doclayout("V3", stages=("stage1", "stage2", "stage3", "stage4"), x4_feat_dim=8), _images, calls=2
    ),
    "pp_doclayout_v4": Example(_pp_doclayout("V4"), _images, calls=2),
    "rt_detr_v2": Example(_rt_detr_v2, _images, calls=2),
    "d_fine": Example(_d_fine, _images, calls=2),
    "deimv2": Example(_deimv2, _images, calls=2),
    "mask2former": Example(_mask2former, _images, calls=2),
    "oneformer": Example(_oneformer, _images_and_tasks, calls=2),
}


def attention_call(family: str, **config) -> tuple[torch.nn.Module, dict]:
    """The first deformable attention of the family's model, perturbed, and the arguments that it is called with.

    Its tensors are leaves; the floating ones want a gradient.
    """
    model, inputs = model_and_inputs(family, **config)
    module = next(module for module in model.modules() if type(module).__name__ == FAMILIES[family].attention)
    perturb_sampling(module)
    calls = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    model(**inputs)
    hook.remove()
    return module, {name: _leaf(argument) for name, argument in calls[0].items()}


def _leaf(argument):
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.detach().clone().requires_grad_(argument.is_floating_point())
