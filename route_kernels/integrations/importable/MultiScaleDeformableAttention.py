"""The compiled extension of Deformable DETR by name, the operators of route-kernels by content."""

from route_kernels.integrations.extension import ms_deform_attn_backward, ms_deform_attn_forward

__all__ = ["ms_deform_attn_backward", "ms_deform_attn_forward"]
