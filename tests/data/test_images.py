"""What becomes of every kind of image, and what is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ssld.data.images import decode
from ssld.errors import DataError

CORNERS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[9, 9, 9], [90, 90, 90], [200, 200, 200]]], np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_keep_every_pixel(kind: str, options: dict[str, object]) -> None:
    image = decode(encode(Image.fromarray(CORNERS), kind, **options))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), CORNERS)


def test_jpeg_is_close_to_the_original() -> None:
    smooth = np.linspace(0, 255, 64).astype(np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    image = np.asarray(decode(encode(Image.fromarray(smooth), "JPEG", quality=95)), np.int64)
    assert np.abs(image - smooth).max() <= 4


def test_pixels_pass_as_they_are() -> None:
    np.testing.assert_array_equal(np.asarray(decode(CORNERS[:, ::-1])), CORNERS[:, ::-1])


# How a stored picture looks to a person, by the EXIF standard: what row 0 and column 0 of the stored pixels are.
SEEN = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("orientation", SEEN)
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_exif_orientation_is_applied(orientation: int, kind: str, options: dict[str, object]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encode(Image.fromarray(CORNERS), kind, exif=exif, **options))
    np.testing.assert_array_equal(np.asarray(image), SEEN[orientation](CORNERS))


@pytest.mark.parametrize("exif", [b"Exif\0\0not a TIFF header", b"Exif\0\0II*\0"], ids=["header", "short"])
def test_broken_exif_counts_as_upright(exif: bytes) -> None:
    plain, broken = encode(noise(), "JPEG"), encode(noise(), "JPEG", exif=exif)
    assert exif in broken
    np.testing.assert_array_equal(np.asarray(decode(broken)), np.asarray(decode(plain)))


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_does_not_exist_counts_as_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(decode(encode(Image.fromarray(CORNERS), exif=exif))), CORNERS)


def test_grey_has_three_equal_channels() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    np.testing.assert_array_equal(np.asarray(decode(encode(Image.fromarray(grey)))), np.stack([grey] * 3, -1))


def test_sixteen_bits_keep_their_high_byte() -> None:
    grey = np.array([[0, 255, 256], [0x7FFF, 0x8000, 0xFFFF]], np.uint16)
    image = np.asarray(decode(encode(Image.fromarray(grey))))
    np.testing.assert_array_equal(image[..., 0], [[0, 0, 1], [0x7F, 0x80, 0xFF]])


def test_sixteen_bit_colour_keeps_its_high_byte() -> None:
    # Pillow writes no such file, so the PNG is put together here: one row of two pixels.
    row = b"\0" + struct.pack(">6H", 0x01FF, 0x8000, 0xFFFF, 0x00FF, 0x7F80, 0x1234)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(np.asarray(decode(png)), [[[0x01, 0x80, 0xFF], [0x00, 0x7F, 0x12]]])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode: str) -> None:
    alpha = np.array([[0, 51, 128, 255]], np.uint8)
    grey = np.array([[0, 100, 30, 77]], np.uint8)
    pixels = np.stack([grey] * (len(mode) - 1) + [alpha], -1)
    share = alpha / 255.0
    expected = grey * share + 255 * (1 - share)
    image = np.asarray(decode(encode(Image.fromarray(pixels, mode))), np.float64)
    assert np.abs(image - expected[..., None]).max() <= 1


def test_a_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert np.asarray(decode(encode(image))).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert np.asarray(decode(encode(image, transparency=0))).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_cmyk_becomes_rgb() -> None:
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 1] = 255  # all magenta reflects red and blue
    image = np.asarray(decode(encode(Image.fromarray(ink, "CMYK"), "JPEG", quality=95)), np.int64)
    assert np.abs(image - [255, 0, 255]).max() <= 6


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.fromarray(CORNERS), Image.fromarray(CORNERS[::-1])]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(np.asarray(decode(data)), CORNERS)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"<html><body>404</body></html>", "<html>"),
        (encode(noise(), "GIF"), "GIF8"),
        (encode(noise(), "JPEG")[:-400], "truncated"),
        (encode(noise(), "PNG")[:-400], "whole"),
        (encode(noise(), "WEBP")[:-400], "whole"),
        (encode(noise(), "PNG").replace(b"IDAT", b"IDAZ"), "whole"),
        (encode(noise(), "JPEG")[:20], "whole"),
    ],
    ids=["empty", "html", "gif", "jpeg cut", "png cut", "webp cut", "png chunk", "jpeg head"],
)
def test_what_is_no_whole_image_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as raised:
        decode(data)
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_anywhere_raises_nothing_but_a_data_error(kind: str) -> None:
    data = encode(noise(24), kind)
    for length in range(0, len(data) - 16, 7):
        with pytest.raises(DataError):
            decode(data[:length])


@pytest.mark.parametrize(("width", "height"), [(7072, 7072), (10_000, 9_500), (60_000, 60_000)])
def test_too_many_pixels_are_refused_by_the_header(width: int, height: int) -> None:
    data = bytearray(encode(Image.new("RGB", (1, 1))))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(DataError, match="at most 50 megapixels"):
        decode(bytes(data))


@pytest.mark.parametrize("size", [(1, 101), (202, 2)])
def test_a_strip_is_refused_because_enlarging_it_would_fill_the_memory(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    for data in (encode(image), np.asarray(image)):
        with pytest.raises(DataError, match=f"ratio of at most 100, got {size[0]} x {size[1]}"):
            decode(data)
    assert decode(encode(Image.new("RGB", (100, 1)))).size == (100, 1)


@pytest.mark.parametrize("pixels", [np.zeros((2, 2), np.uint8), np.zeros((2, 2, 3)), np.zeros((0, 2, 3), np.uint8)])
def test_pixels_of_another_kind_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(DataError, match="uint8 \\[H, W, 3\\]"):
        decode(pixels)
