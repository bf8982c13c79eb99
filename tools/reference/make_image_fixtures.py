#!/usr/bin/env python3
"""Writes tests/data/images/made/: small pictures with features that the other test pictures lack.

Run from the repository root with Pillow installed: python3 tools/reference/make_image_fixtures.py
"""
import io
import os
import struct

from PIL import Image

OUT = "tests/data/images/made/"


def pattern(width, height, mode="RGB"):
    image = Image.new("RGB", (width, height))
    image.putdata([(7 * x % 256, 11 * y % 256, (5 * x + 3 * y) % 256) for y in range(height) for x in range(width)])
    return image.convert(mode)


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def patched(data, *changes):
    data = bytearray(data)
    for at, new in changes:
        data[at:at + len(new)] = new
    return bytes(data)


def encoded(image, **options):
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()


def write(name, data):
    with open(OUT + name, "wb") as file:
        file.write(data)


def main():
    os.makedirs(OUT, exist_ok=True)
    for value in range(1, 9):
        write(f"orientation{value}.png", encoded(pattern(10, 6), format="PNG", exif=orientation(value)))
    write("orientation8.webp", encoded(pattern(24, 16), format="WEBP", lossless=True, exif=orientation(8)))
    write("color_key.png", encoded(pattern(16, 16), format="PNG", transparency=(35, 55, 40)))
    for size in ((6, 2), (2, 6)):
        write("flat_%dx%d.png" % size, encoded(Image.new("RGB", size, (9, 90, 200)), format="PNG"))
    for bits in (2, 4):
        gray = pattern(13, 5, "L").point(lambda v: v >> (8 - bits))
        palette = Image.new("P", gray.size)
        palette.putdata(gray.tobytes())
        palette.putpalette([c for i in range(1 << bits) for c in (i * 15, 255 - i * 15, i * 7)])
        write(f"palette_{bits}bit.png", encoded(palette, format="PNG", bits=bits))

    # A frame of 24 x 20 at (5, 3) of a screen of 40 x 30 with a transparent colour, then one that reaches
    # past the screen.
    gif = encoded(pattern(24, 20).quantize(16), format="GIF", transparency=3, interlace=1)
    descriptor = gif.index(b"," + struct.pack("<HHHH", 0, 0, 24, 20))
    place = (descriptor + 1, struct.pack("<HH", 5, 3))
    write("partial_interlaced.gif", patched(gif, (6, struct.pack("<HH", 40, 30)), place))
    write("beyond_screen.gif", patched(gif, (6, struct.pack("<HH", 10, 10)), place))

    # The same with WebP: two frames of 24 x 16, the first moved to (8, 4) of a canvas of 40 x 30.
    webp = encoded(pattern(24, 16), format="WEBP", lossless=True, save_all=True,
                   append_images=[pattern(24, 16).transpose(Image.Transpose.ROTATE_180)])
    flags = webp.index(b"VP8X") + 8
    has_alpha = (flags, bytes((webp[flags] | 0x10,)))
    canvas = flags + 4
    frames = [i for i in range(len(webp)) if webp[i:i + 4] == b"ANMF"]
    moved = [(at + 8, bytes((4, 0, 0, 2, 0, 0))) for at in frames]
    write("partial_animation.webp", patched(webp, has_alpha, (canvas, bytes((39, 0, 0, 29, 0, 0))), *moved))


main()
