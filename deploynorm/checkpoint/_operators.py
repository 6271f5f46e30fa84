"""The operators that a torch.export archive may call: those of networks in evaluation, chosen by hand.

Torch has some three thousand, and a few trust their arguments: a backward pass takes indices that a forward pass has
made, and writes where they point; `_unsafe` and `unsafe` name others; `set_` and `resize_` choose the memory itself
(`as_strided`, which decomposed archives of ConvNeXt call, stays within what is there: torch compares). So an operator
is admitted only if it stands here. What it does with wild sizes and indices is tried in child processes
(tests/hostile/test_operators.py): it may raise, and may not end the process. docs/security.md names two exceptions.

Not here, though networks may hold them: backward passes, sparse, nested and quantized tensors, and files.
"""

from __future__ import annotations

from typing import Final

import torch

from deploynorm.contract import DOMAIN, TORCH_OPS

ADMITTED: Final = {
    "arithmetic": """
        abs absolute add addcdiv addcmul ceil clamp clamp_max clamp_min clip copysign div divide exp exp2 expm1 floor
        floor_divide fmax fmin fmod frac hypot lerp log log10 log1p log2 logaddexp logaddexp2 max maximum min minimum
        mul multiply neg negative nan_to_num pow positive reciprocal remainder round rsqrt rsub sgn sign signbit sqrt
        square sub subtract true_divide trunc fix xlogy deg2rad rad2deg float_power
    """,
    "functions": """
        acos acosh arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan atan2 atanh cos cosh digamma erf
        erfc erfinv i0 lgamma logit sigmoid sin sinc sinh special_expit special_erf special_expm1 special_log1p tan tanh
    """,
    "activations": """
        celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid log_sigmoid_forward
        log_softmax _log_softmax mish prelu _prelu_kernel relu relu6 selu silu softmax _softmax softplus softshrink
        threshold special_log_softmax special_softmax
    """,
    "comparison and logic": """
        all allclose any bitwise_and bitwise_not bitwise_or bitwise_xor eq equal ge greater greater_equal gt isclose
        isfinite isinf isnan isneginf isposinf isreal le less less_equal logical_and logical_not logical_or logical_xor
        lt masked_fill ne not_equal where __and__ __or__ __xor__ is_nonzero is_floating_point
    """,
    "convolution and products": """
        addbmm addmm addmv addr baddbmm bilinear bmm chain_matmul conv1d conv2d conv3d conv_transpose1d conv_transpose2d
        conv_transpose3d convolution _convolution cosine_similarity dot einsum ger inner kron linalg_vecdot linear
        matmul mm mv outer tensordot _trilinear linalg_multi_dot vdot
    """,
    "normalization": """
        batch_norm group_norm instance_norm layer_norm native_group_norm
        native_layer_norm _native_batch_norm_legit_no_training
        rms_norm _fused_rms_norm linalg_norm linalg_vector_norm norm renorm
    """,
    "attention": """
        scaled_dot_product_attention _scaled_dot_product_attention_math
        _scaled_dot_product_flash_attention_for_cpu
    """,
    "pools and sizes": """
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d max_pool1d
        max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices
        affine_grid_generator grid_sampler grid_sampler_2d grid_sampler_3d
        upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
        _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d
        _upsample_bicubic2d_aa upsample_trilinear3d pixel_shuffle pixel_unshuffle channel_shuffle im2col col2im
        constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
        replication_pad3d
    """,
    "reductions": """
        amax amin aminmax argmax argmin count_nonzero cumprod cumsum cummax cummin logcumsumexp logsumexp mean median
        nanmean nansum prod std std_mean sum var var_mean trace
    """,
    "shape": """
        adjoint alias as_strided atleast_1d atleast_2d atleast_3d
        block_diag broadcast_tensors broadcast_to cat chunk clone
        column_stack concat concatenate contiguous detach diag diag_embed diagonal dsplit dstack expand expand_as
        flatten flip fliplr flipud hsplit hstack lift_fresh_copy matrix_H mH mT meshgrid moveaxis movedim narrow numpy_T
        permute ravel repeat repeat_interleave reshape reshape_as resolve_conj resolve_neg roll rot90 select slice
        slice_scatter select_scatter diagonal_scatter split split_with_sizes squeeze stack swapaxes swapdims t
        tensor_split tile transpose tril triu unbind unflatten unfold unsqueeze view view_as vsplit vstack _reshape_copy
        alias_copy detach_copy diagonal_copy expand_copy permute_copy select_copy slice_copy split_copy
        split_with_sizes_copy squeeze_copy t_copy transpose_copy unbind_copy unfold_copy unsqueeze_copy view_copy
        view_as_complex view_as_real real imag complex
    """,
    "indexing": """
        embedding gather index index_add index_copy index_fill index_put index_select masked_scatter masked_select
        nonzero nonzero_static one_hot scatter scatter_add scatter_reduce searchsorted bucketize sort argsort topk
        kthvalue take take_along_dim tril_indices triu_indices unique_consecutive _unique2 bincount
    """,
    "new tensors": """
        arange empty empty_like empty_permuted eye fill full full_like linspace logspace new_empty new_full new_ones
        new_zeros ones ones_like scalar_tensor zero zeros zeros_like copy
    """,
    "types": """
        _to_copy to type_as item _local_scalar_dense lift_fresh _assert_tensor_metadata result_type
    """,
    "complex numbers": """
        angle conj conj_physical fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift
        fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn _conj _conj_physical
        polar
    """,
    "assertions about sizes": """
        _assert_async _assert_scalar sym_constrain_range sym_constrain_range_for_size sym_numel sym_size
        sym_storage_offset sym_stride sym_is_contiguous
    """,
    # An archive that draws random numbers was traced in training mode, which is told by its nodes.
    "random numbers": """
        alpha_dropout bernoulli dropout feature_alpha_dropout feature_dropout native_dropout normal normal_functional
        rand rand_like randint randint_like randn randn_like randperm rrelu rrelu_with_noise
        rrelu_with_noise_functional uniform exponential multinomial
    """,
}
"""Names by group, in every form (`add` is also `add_` and aten.add.Scalar) but those that write to a given tensor."""

PRIMS: Final = """
    abs add amax amin broadcast_in_dim cat clone convert_element_type cos div eq erf exp expm1 floor
    full ge gt iota le log log1p lt maximum minimum mul ne neg pow prod reciprocal reshape rsqrt sign sin split_dim sqrt
    squeeze sub sum tanh transpose var where collapse collapse_view device_put
"""

TRAINING: Final = {
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_batch_norm_with_update",
    "_batch_norm_with_update_functional",
    "_batch_norm_impl_index",
    "cudnn_batch_norm",
    "miopen_batch_norm",
}
"""Forms of batch normalization that a trace has in training mode alone; not admitted, and told apart in messages."""

WEIGHT_NORM: Final = {"_weight_norm", "_weight_norm_interface"}
"""What computes a weight from two others in each call: torch.nn.utils.weight_norm. Not admitted either."""

_NAMES: Final = {
    "aten": {name for names in ADMITTED.values() for name in names.split()},
    "prims": set(PRIMS.split()),
    DOMAIN: set(TORCH_OPS),
}


def find_operator(namespace: str, name: str, overload: str) -> torch._ops.OpOverload | None:
    """The operator of that name where an archive may call it; None for one that it may not, or that torch lacks."""
    if name not in _NAMES[namespace] and name.removesuffix("_") not in _NAMES[namespace]:
        return None
    operator = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if not isinstance(operator, torch._ops.OpOverload):
        return None
    arguments, results = operator._schema.arguments, operator._schema.returns
    on_tensors = any("Tensor" in str(each.type) for each in (*arguments, *results))  # others are those of TorchScript
    if overload.startswith("prim_"):
        return None
    return operator if on_tensors and not any(argument.is_out for argument in arguments) else None
