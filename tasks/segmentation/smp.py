"""Decoders of segmentation_models_pytorch on this project's backbone; an optional requirement."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from configs import UserError
from configs.errors import first_line

_ENCODER = "groupmixformer_maps"  # as which a decoder knows the backbone


class SmpDecoder(nn.Module):
    """Maps at strides 4, 8, 16 and 32 -> (B, K, H, W), H and W multiples of 32.

    Args:
        name: an architecture of the package, such as Unet, with that architecture's own widths.
        in_channels: of the maps.
        num_classes: K.

    Raises UserError where the package is missing, or has no such architecture, or it does not fit the maps.
    """

    def __init__(self, name: str, in_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        try:
            import segmentation_models_pytorch as smp
        except ImportError:
            raise UserError(
                f"MODEL.HEAD = 'smp:{name}': needs segmentation-models-pytorch; install requirements-extras.txt"
            ) from None
        if name.lower() not in smp.MODEL_ARCHITECTURES_MAPPING:
            known = ", ".join(architecture.__name__ for architecture in smp.MODEL_ARCHITECTURES_MAPPING.values())
            raise UserError(f"MODEL.HEAD = 'smp:{name}': segmentation_models_pytorch has {known}")
        # The package's way to take another encoder: a class in its table.
        smp.encoders.encoders[_ENCODER] = {"encoder": _maps_as_encoder(in_channels), "params": {}}
        try:
            model = smp.create_model(name, encoder_name=_ENCODER, encoder_weights=None, classes=num_classes)
        except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError) as error:
            raise UserError(f"MODEL.HEAD = 'smp:{name}': does not take this backbone: {first_line(error)}") from None
        finally:
            del smp.encoders.encoders[_ENCODER]
        self.decoder, self.segmentation_head = model.decoder, model.segmentation_head

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        # The package's encoders begin with the image and a map at stride 2; the latter has no channels here.
        batch, _, height, width = maps[0].shape
        image = maps[0].new_zeros(batch, 3, 4 * height, 4 * width)
        at_two = maps[0].new_zeros(batch, 0, 2 * height, 2 * width)
        return self.segmentation_head(self.decoder([image, at_two, *maps]))


def _maps_as_encoder(in_channels: Sequence[int]) -> type[nn.Module]:
    """A class that tells a decoder the channels of the maps; it computes nothing."""
    from segmentation_models_pytorch.encoders._base import EncoderMixin

    class Maps(nn.Module, EncoderMixin):
        def __init__(self, depth: int, output_stride: int, **_: Any) -> None:
            super().__init__()
            self._depth, self._in_channels, self._output_stride = depth, 3, output_stride
            self._out_channels = [3, 0, *in_channels]

    return Maps
