"""Image files of every kind become RGB uint8; what cannot be read is named; resizing is an exact area average."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from histodd_bench.data.images import FileEntry, UnreadableImage, enlarged, read_rgb, resize, square, write_files
from histodd_bench.data.store import StoreWriter

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def saved(path, image, **options):
    image.save(path, **options)
    return path


def test_rgb_is_read_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for name in ("a.png", "a.tif", "a.bmp", "a.webp"):
        options = {"lossless": True} if name.endswith("webp") else {}
        assert np.array_equal(read_rgb(saved(tmp_path / name, Image.fromarray(pixels), **options)), pixels), name


def test_grey_becomes_three_equal_channels(tmp_path):
    got = read_rgb(saved(tmp_path / "a.png", Image.fromarray(GREY)))
    assert np.array_equal(got, np.repeat(GREY[..., None], 3, 2))


def test_one_bit_is_black_and_white(tmp_path):
    got = read_rgb(saved(tmp_path / "a.png", Image.fromarray(GREY > 100)))
    assert np.array_equal(got[..., 0], np.where(GREY > 100, 255, 0))


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_is_scaled_by_its_full_range(tmp_path, name):
    wide = np.array([[0, 257, 128 * 257, 65535], [100, 256, 65407, 1]], dtype=np.uint16)
    got = read_rgb(saved(tmp_path / name, Image.fromarray(wide)))[..., 0]
    assert got.tolist() == [[0, 1, 128, 255], [0, 1, 255, 0]]


def test_16_bit_colour(tmp_path):
    rows = np.array([[[0, 32768, 65535]] * 4] * 2, dtype=">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 2, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    assert np.abs(read_rgb(tmp_path / "a.png").astype(int) - [0, 128, 255]).max() <= 1


def test_transparency_becomes_white(tmp_path):
    rgba = np.zeros((2, 3, 4), dtype=np.uint8)
    rgba[0] = (200, 0, 100, 0)
    rgba[1] = (200, 0, 100, 255)
    rgba[1, 2] = (0, 0, 0, 128)
    got = read_rgb(saved(tmp_path / "a.png", Image.fromarray(rgba)))
    assert (got[0] == 255).all() and got[1, 0].tolist() == [200, 0, 100]
    assert abs(int(got[1, 2, 0]) - 127) <= 1


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 0]], dtype=np.uint8))
    image = image.convert("P")
    image.putdata([0, 1, 2, 0])
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 255] + [0] * 759)
    assert read_rgb(saved(tmp_path / "a.png", image))[0].tolist() == [[10, 20, 30], [200, 100, 50]]
    got = read_rgb(saved(tmp_path / "b.png", image, transparency=1))
    assert got[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_grey_with_alpha_and_cmyk(tmp_path):
    la = Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (8, 8), 0)])
    assert (read_rgb(saved(tmp_path / "a.png", la)) == 255).all()
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    got = read_rgb(saved(tmp_path / "a.jpg", cmyk, quality=95))
    assert np.abs(got.astype(int) - [255, 0, 0]).max() <= 6


def test_orientation_tag_is_ignored(tmp_path):
    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter when shown
    assert read_rgb(saved(tmp_path / "a.jpg", image, exif=exif)).shape == (2, 4, 3)


def png_bytes():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("cut.png", png_bytes()[:2000], "truncated|broken"),
        ("head.png", png_bytes()[:20], "(?i)not an image|truncated|broken"),
        ("text.png", b"not a picture", "not an image"),
        ("empty.png", b"", "empty file"),
    ],
)
def test_unreadable_files_are_named_with_the_reason(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableImage, match=reason) as error:
        read_rgb(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_truncated_jpeg_and_missing_file(tmp_path):
    path = saved(
        tmp_path / "a.jpg", Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    )
    os.truncate(path, 1000)
    with pytest.raises(UnreadableImage, match="truncated"):
        read_rgb(path)
    with pytest.raises(UnreadableImage, match="No such file"):
        read_rgb(tmp_path / "none.png")


def test_32_bit_pixels_are_refused(tmp_path):
    path = saved(tmp_path / "a.tif", Image.fromarray(np.ones((4, 4), dtype=np.float32)))
    with pytest.raises(UnreadableImage, match="32 bit"):
        read_rgb(path)


@pytest.mark.parametrize("kind", [np.float32, np.uint32])
def test_colour_of_another_pixel_type_is_said_to_be_that(tmp_path, kind):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((8, 8, 3), dtype=kind), photometric="rgb")
    with pytest.raises(
        UnreadableImage, match=rf"pixels of type {np.dtype(kind)} x 3 cannot be read: save it as RGB with 8"
    ):
        read_rgb(tmp_path / "a.tif")
    os.truncate(tmp_path / "a.tif", 20)
    with pytest.raises(UnreadableImage, match="not an image"):
        read_rgb(tmp_path / "a.tif")


@given(cut=st.integers(0, 1500), flip=st.integers(0, 5000))
def test_damaged_bytes_never_raise_anything_else(tmp_path_factory, cut, flip):
    data = bytearray(png_bytes())
    data = data[: len(data) - cut]
    data[flip % len(data)] ^= 0xFF
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(data)
    try:
        assert read_rgb(path).ndim == 3
    except UnreadableImage:
        pass


def test_square_crops_the_middle_or_pads_with_white():
    wide = np.zeros((2, 4, 3), dtype=np.uint8)
    wide[:, :, 0] = [1, 2, 3, 4]
    assert square(wide, "crop")[..., 0].tolist() == [[2, 3], [2, 3]]
    assert square(wide, "pad")[..., 0].tolist() == [[255] * 4, [1, 2, 3, 4], [1, 2, 3, 4], [255] * 4]
    tall = wide.transpose(1, 0, 2)
    assert square(tall, "crop")[..., 0].tolist() == [[2, 2], [3, 3]]


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 100))
def test_whole_factors_are_block_means(factor, side, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (side * factor, side * factor, 3), dtype=np.uint8)
    means = pixels.reshape(side, factor, side, factor, 3).mean((1, 3))
    got = resize(pixels, side, side)
    assert np.abs(got - means).max() <= 0.5 + 1e-3


@given(st.integers(2, 60), st.data())
def test_area_average_keeps_the_mean_and_the_range(n, data):
    m = data.draw(st.integers(1, n))
    pixels = np.random.default_rng(n).integers(0, 256, (n, n, 3), dtype=np.uint8)
    got = resize(pixels, m, m)
    assert abs(got.mean() - pixels.mean()) < 0.6
    assert (resize(np.full((n, n, 3), 137, np.uint8), m, m) == 137).all()


def test_a_known_fractional_average():
    pixels = np.zeros((3, 3, 3), dtype=np.uint8)
    pixels[:, 1] = 90  # half of this column belongs to each of two output columns of 1.5
    assert resize(pixels, 2, 2)[..., 0].tolist() == [[30, 30], [30, 30]]


def test_enlarging_interpolates():
    got = resize(np.array([[[0] * 3, [100] * 3]] * 2, dtype=np.uint8), 4, 4)[0, :, 0].tolist()
    assert got == sorted(got) and got[0] == 0 and got[-1] == 100 and 0 < got[1] < got[2] < 100


@pytest.mark.parametrize("workers", [1, 3])
def test_files_keep_their_order_and_bad_ones_are_returned(tmp_path, workers):
    entries = []
    for i in range(40):
        path = tmp_path / f"{i:02d}.png"
        if i % 10 == 3:
            path.write_bytes(b"no")
        else:
            Image.new("RGB", (6, 6 + i % 2), (i, 0, 0)).save(path)
        entries.append(FileEntry(path, i % 2, f"g{i // 4}", (("x", i),)))
    advanced = []
    with StoreWriter(tmp_path / "store", (4, 4), ("a", "b")) as writer:
        bad, sides, hashes = write_files(
            writer, entries, image_size=4, fit="crop", workers=workers, advance=advanced.append
        )
        ps = writer.finish()
    good = [i for i in range(40) if i % 10 != 3]
    assert ps.images[:, 0, 0, 0].tolist() == good
    assert [error.path.name for error in bad] == ["03.png", "13.png", "23.png", "33.png"]
    assert [ps.group_names[g] for g in ps.groups] == [f"g{i // 4}" for i in good]
    assert sum(advanced) == 40 and sides == {6: 36}
    assert [path.name for _, path in hashes] == [f"{i:02d}.png" for i in good] and len(set(dict(hashes))) == 36


def test_fewer_patches_are_held_at_once_where_they_are_large(tmp_path):
    entries = [FileEntry(saved(tmp_path / f"{i}.png", Image.new("RGB", (4, 4))), 0, "g") for i in range(12)]
    advanced = []
    with StoreWriter(tmp_path / "store", (2048, 2048), ("a", "b")) as writer:
        write_files(writer, entries, image_size=2048, fit="crop", advance=advanced.append)
    assert max(advanced) * 3 * 2048**2 <= 1 << 27 and sum(advanced) == 12


def test_enlarged_patches_are_counted_by_size():
    assert enlarged({12: 3, 16: 2}, 5, 12) == enlarged({}, 0, 12) == []
    assert enlarged({12: 3, 16: 2}, 5, 16) == ["3 of 5 patches are enlarged from 12 to 16 px"]
    (note,) = enlarged({12: 3, 16: 70, 20: 4, 9: 1, 10: 2, 40: 8}, 88, 32)
    assert note.startswith(
        "80 of 88 patches are enlarged to 32 px: 70 from 16 px, 4 from 20 px, 3 from 12 px and 3 from"
    )
