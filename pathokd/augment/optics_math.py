"""Scanner as arithmetic: light, optics, sensor, colour processing and compression, one pure function each.

All take and return an 8-bit image, leave their input alone, and are exactly the identity at amount 0. What happens to
light (lamp, lens, sensor gain, colour matrix) is computed in linear light; what a scanner does to finished values
(tone, noise as seen in the file, sharpening, compression) on the values themselves. Linear light is the square of the
value: within a few per cent of sRGB's curve over the range of tissue and glass, undone exactly, and a square root is
one machine instruction.
"""

import math
from functools import cache

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from pathokd.types import FloatArray, Rgb

F32 = npt.NDArray[np.float32]

_VALUES = np.arange(256, dtype=np.float64)
_SQUARES = (_VALUES**2).astype(np.float32)
_LUMA = np.array([0.2126, 0.7152, 0.0722])
"""Share of red, green and blue in luminance (IEC 61966-2-1, sRGB)."""
_BORDER = cv2.BORDER_REFLECT_101


def check_rgb(rgb: Rgb) -> Rgb:
    """The image, contiguous.

    Raises:
        ValueError: not uint8 of shape (height, width, 3), or without pixels.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.size == 0:
        raise ValueError(
            f"the image must be uint8 of shape (height, width, 3), got {rgb.dtype} {rgb.shape}: convert it to RGB."
        )
    return np.ascontiguousarray(rgb)


def to_light(rgb: Rgb) -> F32:
    """Linear light, 0 to 65025, same shape."""
    return np.asarray(cv2.LUT(rgb, _SQUARES), np.float32)


def from_light(light: F32) -> Rgb:
    """The image of linear light, rounded and clipped; `from_light(to_light(x))` is `x`."""
    return np.asarray(cv2.convertScaleAbs(cv2.sqrt(light)), np.uint8)


def hue_saturation(hue_deg: float, saturation: float) -> FloatArray:
    """Matrix (3, 3) that turns colours about grey by `hue_deg` and spreads them from grey by `saturation`.

    Rows sum to 1, so greys stay; 0 and 1 give the unit matrix.

    Reference:
        W3C, Filter Effects Module Level 1, section 9.3, `hueRotate` and `saturate`.
    """
    grey = np.tile(_LUMA, (3, 1))
    turn = np.array([[-0.213, -0.715, 0.928], [0.143, 0.140, -0.283], [-0.787, 0.715, 0.072]])
    angle = math.radians(hue_deg)
    hue = grey + math.cos(angle) * (np.eye(3) - grey) + math.sin(angle) * turn
    return np.asarray((saturation * np.eye(3) + (1 - saturation) * grey) @ hue)


def colour_matrix(rgb: Rgb, matrix: FloatArray) -> Rgb:
    """Mix the channels in linear light, where scanners apply their colour correction matrix (before the tone curve).

    Args:
        rgb: (height, width, 3).
        matrix: (3, 3); rows that sum to 1 keep greys.
    """
    if np.array_equal(matrix, np.eye(3)):
        return rgb.copy()
    mixed = cv2.transform(to_light(rgb), np.asarray(matrix, np.float32))
    return from_light(np.maximum(mixed, np.float32(0)))


def white_balance(rgb: Rgb, gains: FloatArray) -> Rgb:
    """Multiply red, green and blue light.

    Args:
        rgb: (height, width, 3).
        gains: (3,) factors of linear light, positive; 1 changes nothing.
    """
    return _look_up(rgb, np.sqrt(np.asarray(gains, np.float64)) * _VALUES[:, None])


def gamma(rgb: Rgb, exponent: float) -> Rgb:
    """Raise values (0 to 1) to `exponent`: over 1 darkens the middle, black and white stay."""
    return _look_up(rgb, 255 * (_VALUES / 255) ** exponent)


def tone_curve(rgb: Rgb, contrast: float) -> Rgb:
    """S-curve about middle grey, t + c t (1 - t) (2t - 1): black, middle and white stay.

    Args:
        rgb: (height, width, 3).
        contrast: -2 to 1, where the curve rises everywhere; 0 is none, negative flattens.
    """
    t = _VALUES / 255
    return _look_up(rgb, 255 * (t + contrast * t * (1 - t) * (2 * t - 1)))


def _look_up(rgb: Rgb, curve: FloatArray) -> Rgb:
    """Replace values by `curve`, (256,) for all channels or (256, 3)."""
    table = np.clip(np.rint(curve), 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(rgb, table if table.ndim == 1 else table[None]), np.uint8)


def illuminant(rgb: Rgb, mired: float, *, residual: float = 0.25) -> Rgb:
    """Another lamp, as a scanner that balances its white only in part shows it.

    Args:
        rgb: (height, width, 3).
        mired: shift along the daylight locus from 6504 K in reciprocal megakelvin; above 0 is warmer. -114 to 96.
        residual: part of the white's change (as a power) that the scanner's white balance leaves.
    """
    return rgb.copy() if mired == 0 else colour_matrix(rgb, illuminant_matrix(mired, residual))


@cache
def _cone_basis() -> tuple[FloatArray, FloatArray]:
    """Linear sRGB to Bradford's cone responses, and to XYZ (IEC 61966-2-1)."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    return bradford @ xyz, xyz


def illuminant_matrix(mired: float, residual: float) -> FloatArray:
    """Matrix (3, 3) in linear light for `illuminant`.

    The lamp scales the responses of Bradford's cones (von Kries); the scanner scales its own channels, so with the
    white put right colours still differ a little, as they do between real lamps.
    """
    to_cones, to_xyz = _cone_basis()
    x, y = daylight_xy(1e6 / (1e6 / 6504 + mired))
    lamp_xyz = np.array([x / y, 1.0, (1 - x - y) / y])
    lamp = to_cones @ np.linalg.solve(to_xyz, lamp_xyz) / to_cones.sum(axis=1)
    seen = np.linalg.solve(to_cones, lamp[:, None] * to_cones)
    balance = seen.sum(axis=1) ** (residual - 1)
    return np.asarray(balance[:, None] * seen)


def daylight_xy(kelvin: float) -> tuple[float, float]:
    """Chromaticity of daylight of a colour temperature.

    Reference:
        CIE 15:2004, Colorimetry, section 3.1, equations 3.2 to 3.4.

    Raises:
        ValueError: outside 4000 to 25000 K.
    """
    if not 4000 <= kelvin <= 25000:
        raise ValueError(
            f"daylight is defined from 4000 to 25000 K, got {kelvin:.0f} K: choose a shift of -114 to 96 mired."
        )
    k = 1e3 / kelvin
    x = (
        0.244063 + 0.09911 * k + 2.9678 * k**2 - 4.6070 * k**3
        if kelvin <= 7000
        else 0.237040 + 0.24748 * k + 1.9018 * k**2 - 2.0064 * k**3
    )
    return x, -3.0 * x**2 + 2.870 * x - 0.275


def gaussian_blur(rgb: Rgb, sigma_px: float) -> Rgb:
    """Optical blur of standard deviation `sigma_px`, in linear light, mirrored at the border."""
    if sigma_px <= 0:
        return rgb.copy()
    side = 2 * math.ceil(3.5 * sigma_px) + 1
    blurred = cv2.GaussianBlur(to_light(rgb), (side, side), sigma_px, borderType=_BORDER)
    return from_light(np.asarray(blurred, np.float32))


def defocus(rgb: Rgb, radius_px: float) -> Rgb:
    """Out of focus: light spread over the disc of confusion of radius `radius_px`, in linear light."""
    if radius_px <= 0:
        return rgb.copy()
    blurred = cv2.filter2D(to_light(rgb), -1, disc_kernel(radius_px), borderType=_BORDER)
    return from_light(np.asarray(blurred, np.float32))


@cache
def _unit_disc() -> tuple[FloatArray, FloatArray]:
    """1024 points of equal weight that fill the unit disc, with its symmetries."""
    radius = np.sqrt((np.arange(16) + 0.5) / 16)
    angle = (np.arange(64) + 0.5) * (2 * math.pi / 64)
    return np.outer(radius, np.cos(angle)).ravel(), np.outer(radius, np.sin(angle)).ravel()


def disc_kernel(radius_px: float) -> F32:
    """Weights of a disc's points spread bilinearly over pixels: grows continuously from a single 1 at radius 0.

    Returns:
        Square, odd side, sum 1, second moment per axis at least `radius_px**2 / 4`.
    """
    reach = math.ceil(radius_px)
    pixels = np.arange(-reach, reach + 1)
    x, y = (np.maximum(1 - np.abs(radius_px * p[:, None] - pixels), 0.0) for p in _unit_disc())
    return np.asarray(y.T @ x / len(x), np.float32)


def unsharp_mask(rgb: Rgb, amount: float, radius_px: float = 1.0) -> Rgb:
    """Add `amount` times what a Gaussian of deviation `radius_px` takes away; on values, as scanners' software does."""
    if amount <= 0:
        return rgb.copy()
    side = 2 * math.ceil(3 * radius_px) + 1
    soft = cv2.GaussianBlur(rgb.astype(np.float32), (side, side), radius_px, borderType=_BORDER)
    return np.asarray(cv2.addWeighted(rgb, 1 + amount, soft, -amount, 0.0, dtype=cv2.CV_8U), np.uint8)


_NORMAL = ndtri((_VALUES + 0.5) / 256)
_NORMAL = (_NORMAL / _NORMAL.std() / math.sqrt(2.0)).astype(np.float32)
"""Quantiles of a normal distribution with variance 1/2; two draws add up to variance 1 and reach 4 deviations."""


def sensor_noise(rgb: Rgb, shot: float, read: float, rng: np.random.Generator) -> Rgb:
    """White Gaussian noise of variance `shot**2 * value / 255 + read**2`, independent in each pixel and channel.

    Args:
        rgb: (height, width, 3).
        shot: standard deviation at full scale in 8-bit steps, of noise whose variance is proportional to the signal.
        read: standard deviation in 8-bit steps, of noise that is the same everywhere.
        rng: source of the noise; the same state gives the same pattern at any strength.
    """
    if shot <= 0 and read <= 0:
        return rgb.copy()
    draws = np.frombuffer(rng.bytes(2 * rgb.size), np.uint8).reshape(2, *rgb.shape)
    normal = cv2.add(*(cv2.LUT(part, _NORMAL) for part in draws))
    deviation = np.sqrt(shot**2 * _VALUES / 255 + read**2).astype(np.float32)
    noise = cv2.multiply(normal, cv2.LUT(rgb, deviation))
    return np.asarray(cv2.add(rgb, noise, dtype=cv2.CV_8U), np.uint8)


def jpeg(rgb: Rgb, quality: int | None, grid: tuple[int, int] = (0, 0)) -> Rgb:
    """Through JPEG with 4:2:0 chroma, as scanners store it.

    Args:
        rgb: (height, width, 3).
        quality: of libjpeg, 1 to 100; None leaves the image as it is.
        grid: columns and rows (0 to 15) by which the grid of blocks begins outside the image, on the left and above.
    """
    if quality is None:
        return rgb.copy()
    left, top = grid
    framed = cv2.copyMakeBorder(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), top, 0, left, 0, cv2.BORDER_REFLECT)
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    ]
    stored = np.asarray(cv2.imdecode(cv2.imencode(".jpg", framed, options)[1], cv2.IMREAD_COLOR), np.uint8)
    return np.asarray(cv2.cvtColor(stored[top:, left:], cv2.COLOR_BGR2RGB), np.uint8)


def jpeg_quality_at(quality: int, severity: float) -> int | None:
    """Quality whose quantisation is `severity` times as coarse as at `quality`; None at severity 0.

    Reference:
        libjpeg, jcparam.c, `jpeg_quality_scaling`.
    """
    if severity <= 0:
        return None
    scale = severity * (5000 / quality if quality < 50 else 200 - 2 * quality)
    return max(1, min(100, round(5000 / scale if scale > 100 else 100 - scale / 2)))


def jpeg2000(rgb: Rgb, rmse: float) -> Rgb:
    """Through lossy JPEG 2000 at a root mean square error of about `rmse` 8-bit steps.

    Slow (some 10 ms for 224 px). Aperio's files at 18 to 1 lie near 3 steps.
    """
    if rmse <= 0:
        return rgb.copy()
    smallest = min(rgb.shape[:2])
    # Each resolution halves the image; the codec refuses more than it has pixels for.
    levels = min(6, max(1, int(math.log2(smallest)) + 1))
    psnr_db = 20 * math.log10(255 / rmse)
    code = imagecodecs.jpeg2k_encode(rgb, level=psnr_db, resolutions=levels)  # type: ignore[arg-type]
    return np.asarray(imagecodecs.jpeg2k_decode(code), np.uint8).reshape(rgb.shape)


def chromatic_shift(rgb: Rgb, dx_px: float, dy_px: float = 0.0) -> Rgb:
    """Move red by (dx, dy) pixels and blue by as much the other way, in linear light; green stays.

    Interpolation is by Keys' cubic, which at half a pixel takes less from fine detail than a linear one.
    """
    if dx_px == 0 and dy_px == 0:
        return rgb.copy()
    light = to_light(rgb)
    planes = list(cv2.split(light))
    for channel, sign in ((0, 1.0), (2, -1.0)):
        across, down = (_shift_kernel(sign * d) for d in (dx_px, dy_px))
        planes[channel] = cv2.sepFilter2D(planes[channel], -1, across, down, borderType=_BORDER)
    return from_light(np.maximum(cv2.merge(planes), np.float32(0)))


def _shift_kernel(shift_px: float) -> F32:
    """Row of weights that moves an image by `shift_px` to the right; sums to 1.

    Reference:
        Keys 1981, "Cubic convolution interpolation for digital image processing", IEEE TASSP 29, a = -1/2.
    """
    reach = math.ceil(abs(shift_px)) + 1
    t = np.abs(np.arange(-reach, reach + 1) + shift_px)
    near, far = (1.5 * t - 2.5) * t**2 + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
    return np.where(t < 1, near, np.where(t < 2, far, 0.0)).astype(np.float32)


def resample(rgb: Rgb, zoom: float) -> Rgb:
    """Enlarge about the centre by `zoom` on the same grid of pixels; below 1 the border is filled by reflection.

    What a wrong or rounded number of microns per pixel does. The centre stays where it is; a point r pixels from it
    moves by (zoom - 1) r.
    """
    if zoom == 1:
        return rgb.copy()
    height, width = rgb.shape[:2]
    inverse = np.array(
        [[1 / zoom, 0, (width - 1) / 2 * (1 - 1 / zoom)], [0, 1 / zoom, (height - 1) / 2 * (1 - 1 / zoom)]]
    )
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return np.asarray(
        cv2.warpAffine(rgb, inverse, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT), np.uint8
    )
