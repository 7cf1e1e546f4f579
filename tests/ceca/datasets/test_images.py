"""Encoded images: they decode as a viewer shows them, and each kind of damage has its own reason."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms

from ceca.datasets.images import TURNS, ImageError, check_image, decode_image, mime_type, open_image, plain_image


def encoded(format: str, mode: str = "RGB", size: tuple[int, int] = (20, 40)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("format", "mode", "mime"),
    [
        ("JPEG", "RGB", "image/jpeg"),
        ("JPEG", "L", "image/jpeg"),
        ("JPEG", "CMYK", "image/jpeg"),
        ("PNG", "RGBA", "image/png"),
        ("PNG", "P", "image/png"),
        ("WEBP", "RGB", "image/webp"),
        ("BMP", "RGB", "image/bmp"),
    ],
)
def test_every_accepted_format_and_mode_decodes_to_rgb_of_the_requested_size(format: str, mode: str, mime: str):
    content = encoded(format, mode)
    assert check_image(content) == (20, 40)
    pixels = decode_image(content, height=64, width=32)
    assert (pixels.shape, pixels.dtype) == ((64, 32, 3), np.uint8)
    assert mime_type(content) == mime


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not_an_image"),
        (b"this is text", "not_an_image"),
        (encoded("GIF", "P"), "not_an_image"),
        (encoded("JPEG")[:-200], "truncated_image"),
        (encoded("PNG")[:-200], "truncated_image"),
        (encoded("PNG", "1", (8000, 8000)), "image_too_large"),
    ],
)
def test_unusable_bytes_have_a_reason(content: bytes, reason: str):
    with pytest.raises(ImageError) as caught:
        check_image(content)
    assert caught.value.reason == reason


def test_a_palette_that_is_missing_is_damage():
    content = encoded("PNG", "P")
    start = content.index(b"PLTE")
    length = int.from_bytes(content[start - 4 : start])
    with pytest.raises(ImageError, match="no palette"):
        check_image(content[: start - 4] + content[start + 8 + length :])


WHOLE = encoded("JPEG")


@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=40))
def test_damaged_bytes_decode_or_raise_an_image_error(position: int, damage: bytes):
    content = WHOLE[:position] + damage + WHOLE[position + len(damage) :]
    try:
        shape = decode_image(content, 16, 8).shape
    except ImageError as error:
        reason = error.reason
    else:
        reason = "none" if shape == (16, 8, 3) else "wrong shape"
    assert reason in ("none", "not_an_image", "truncated_image", "image_too_large", "costly_image")


# --- as a viewer shows it ---------------------------------------------------------------------------------


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def shown(content: bytes) -> np.ndarray:
    return np.asarray(open_image(content)).astype(int)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
LEFT_RED = Image.fromarray(np.where(np.arange(16)[None, :, None] < 8, [250, 10, 10], [10, 10, 250]).astype(np.uint8))
LEFT_RED = LEFT_RED.resize((16, 32), Image.Resampling.NEAREST)  # upright: its left half is red


@pytest.mark.parametrize("transparency", [None, 0])
def test_sixteen_bit_grey_is_scaled(transparency: int | None):
    options = {} if transparency is None else {"transparency": transparency}
    pixels = shown(saved(Image.fromarray(RAMP.astype(np.uint16) * 257), **options))
    expected = RAMP.astype(int).copy()
    expected[0, 0] = 0 if transparency is None else 255  # transparent pixels lie on white
    assert (pixels == expected[..., None]).all()


def test_bilevel_images_are_black_and_white():
    assert set(np.unique(shown(saved(Image.fromarray(RAMP > 99))))) == {0, 255}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9, 600])
def test_exif_orientation_turns_the_image_upright(format: str, orientation: int):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turn = back.get(orientation, TURNS.get(orientation))  # the other turns undo themselves
    stored = LEFT_RED if turn is None else LEFT_RED.transpose(turn)
    content = saved(stored, format, exif=exif, **({"quality": 95} if format != "PNG" else {"compress_level": 1}))
    assert check_image(content) == LEFT_RED.size
    pixels = shown(content)
    assert pixels[4:-4, :6, 0].min() > 200 > 60 > pixels[4:-4, :6, 2].max()
    assert pixels[4:-4, -6:, 2].min() > 200


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0nonsense", b"\xff" * 40])
def test_damaged_exif_data_does_no_harm(exif: bytes):
    assert (shown(saved(LEFT_RED, exif=exif)) == np.asarray(LEFT_RED)).all()


def red_with_alpha(mode: str) -> tuple[bytes, list[int]]:
    """A picture without anything to see in its left half, and the colour that a viewer shows in the right one."""
    red = Image.new("RGBA", (16, 16), (200, 0, 0, 255))
    red.paste((0, 200, 0, 0), (0, 0, 8, 16))
    if mode == "LA":
        return saved(red.convert("LA")), [60, 60, 60]
    if mode == "P with a list":
        return saved(red.quantize(16)), [200, 0, 0]
    if mode == "P with a colour":
        plain = red.convert("RGB").quantize(16)
        return saved(plain, transparency=plain.getpixel((0, 0))), [200, 0, 0]
    if mode == "RGB with a colour":
        return saved(red.convert("RGB"), transparency=(0, 200, 0)), [200, 0, 0]
    if mode == "L with a colour":
        plain = red.convert("L")
        return saved(plain, transparency=plain.getpixel((0, 0))), [60, 60, 60]
    if mode == "1 with a colour":
        plain = Image.fromarray(np.arange(16)[None].repeat(16, 0) < 8)
        return saved(plain, transparency=1), [0, 0, 0]
    return saved(red, mode, **({"lossless": True} if mode == "WEBP" else {})), [200, 0, 0]


@pytest.mark.parametrize(
    "mode",
    [
        "PNG",
        "WEBP",
        "LA",
        "P with a list",
        "P with a colour",
        "RGB with a colour",
        "L with a colour",
        "1 with a colour",
    ],
)
def test_transparent_pixels_lie_on_white(mode: str, recwarn: pytest.WarningsRecorder):
    content, colour = red_with_alpha(mode)
    pixels = shown(content)
    assert (pixels[:, :8] == 255).all()
    assert np.abs(pixels[:, 8:] - colour).max() <= 1
    assert not recwarn.list


def test_half_transparent_pixels_are_mixed_with_white():
    assert (shown(saved(Image.new("RGBA", (4, 4), (0, 0, 0, 51)))) == 204).all()


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_jpegs_are_read_as_inverted(adobe: bool):
    content = saved(LEFT_RED.convert("CMYK"), "JPEG", quality=95)
    if not adobe:  # browsers read such a file the same way
        start = content.index(b"\xff\xee")
        content = content[:start] + content[start + 2 + int.from_bytes(content[start + 2 : start + 4]) :]
    assert np.abs(shown(content) - np.asarray(LEFT_RED)).mean() < 12


def swapped_profile() -> bytes:
    """An RGB profile whose red primary is sRGB's blue and the reverse: it exchanges the two."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_colours_are_converted_from_their_profile(format: str):
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    content = saved(LEFT_RED, format, icc_profile=swapped_profile(), **options)
    pixels = shown(content)
    assert pixels[:, :6, 2].min() > 220 > 60 > pixels[:, :6, 0].max()
    with_alpha = LEFT_RED.copy()
    with_alpha.putalpha(255)
    pixels = shown(saved(with_alpha, icc_profile=swapped_profile()))
    assert pixels[:, :6, 2].min() > 220


def test_a_profile_of_a_palette_is_used():
    pixels = shown(saved(LEFT_RED.quantize(4), icc_profile=swapped_profile()))
    assert pixels[:, :6, 2].min() > 220 > 60 > pixels[:, :6, 0].max()


@pytest.mark.parametrize(
    "profile",
    [ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"nonsense", swapped_profile()[:300]],
)
def test_srgb_itself_and_damaged_profiles_change_nothing(profile: bytes):
    assert (shown(saved(LEFT_RED, icc_profile=profile)) == np.asarray(LEFT_RED)).all()


def small_profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile with these tags."""
    table, data = b"", b""
    for name, value in tags.items():
        table += name + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    white = struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    rest = struct.pack(">I", len(tags)) + table + data
    head = struct.pack(">I4sI4s4s4s", 128 + len(rest), b"", 0x02100000, kind, space, connection)
    return (head.ljust(36, b"\0") + b"acsp").ljust(68, b"\0") + white.ljust(60, b"\0") + rest


def test_a_profile_of_grey_is_used():
    white = b"XYZ \0\0\0\0" + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    linear = b"curv" + struct.pack(">III", 0, 0, 0)
    profile = small_profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": white, b"kTRC": linear[:12]})
    content = saved(Image.new("L", (4, 4), 128), icc_profile=profile)
    assert np.abs(shown(content) - 188).max() <= 1


def test_a_profile_of_cmyk_is_used():
    """By this profile, cyan ink alone makes a colour darker."""
    identity = bytes(range(256))
    lightness = b"".join(bytes([0 if cyan else 255, 128, 128]) for cyan in (0, 1) for _ in range(8))
    matrix = struct.pack(">9i", *(65536 * (place % 4 == 0) for place in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity * 4 + lightness + identity * 3
    profile = small_profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})
    for ink, lowest, highest in (((0, 255, 255, 255), 250, 255), ((255, 0, 0, 0), 0, 5)):
        content = saved(Image.new("CMYK", (8, 8), ink), "JPEG", quality=95, icc_profile=profile)
        pixels = shown(content)
        assert lowest <= pixels.min() <= pixels.max() <= highest


def test_a_profile_for_another_kind_of_image_changes_nothing():
    assert (shown(saved(Image.fromarray(RAMP), icc_profile=swapped_profile())) == RAMP[..., None]).all()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize(("gamma", "grey"), [(1.0, 186), (1 / 2.2, 128), (0.0, 128)])
def test_a_png_with_another_gamma_is_corrected(gamma: float, grey: int):
    content = saved(Image.new("L", (4, 4), 128))
    header = content.index(b"IDAT") - 4
    content = content[:header] + chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000))) + content[header:]
    assert np.abs(shown(content) - grey).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation_counts(format: str):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = saved(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    assert (shown(content) == [255, 0, 0]).all()


@pytest.mark.parametrize("key", [b"\x03\x03", b"\xff\xff"])
def test_a_transparent_colour_that_no_pixel_can_have_does_no_harm(key: bytes):
    for mode, data in (("L", key), ("RGB", key * 3)):
        content = saved(Image.new(mode, (4, 4), "red"))
        header = content.index(b"IDAT") - 4
        content = content[:header] + chunk(b"tRNS", data) + content[header:]
        assert shown(content).shape == (4, 4, 3)


def test_only_images_that_programs_may_misread_are_encoded_again():
    for format in ("JPEG", "PNG", "WEBP", "BMP"):
        content = saved(LEFT_RED, format)
        assert plain_image(content) == content
    for special in (
        saved(Image.fromarray(RAMP.astype(np.uint16) * 257)),
        red_with_alpha("PNG")[0],
        red_with_alpha("P with a list")[0],
        saved(LEFT_RED, icc_profile=swapped_profile()),
        saved(LEFT_RED.convert("CMYK"), "JPEG"),
    ):
        plain = plain_image(special)
        assert (np.asarray(Image.open(io.BytesIO(plain)).convert("RGB")) == shown(special)).all()


@pytest.mark.parametrize(("resize", "mode"), [("bilinear", "BILINEAR"), ("bicubic", "BICUBIC")])
@pytest.mark.parametrize("size", [(16, 8), (384, 128)], ids=["smaller", "larger"])
def test_images_are_resized_as_torchvision_does_it(resize: str, mode: str, size: tuple[int, int]):
    content = encoded("PNG")
    import torchvision.transforms  # slow to import

    transform = torchvision.transforms.Resize(size, torchvision.transforms.InterpolationMode[mode], antialias=True)
    assert np.array_equal(decode_image(content, *size, resize), np.asarray(transform(Image.open(io.BytesIO(content)))))
    assert np.array_equal(decode_image(content, *size), decode_image(content, *size, "bicubic"))


@pytest.mark.parametrize("name", [b"iCCP", b"gAMA", b"pHYs", b"tRNS", b"eXIf", b"acTL", b"fcTL"])
@pytest.mark.parametrize("data", [b"", b"a", b"a\0", b"\xff" * 40], ids=range(4))
def test_a_damaged_piece_after_the_pixels_is_an_image_error_or_nothing(name: bytes, data: bytes):
    content = saved(LEFT_RED)
    end = content.rindex(b"IEND") - 4
    with contextlib.suppress(ImageError):
        check_image(content[:end] + chunk(name, data) + content[end:])
