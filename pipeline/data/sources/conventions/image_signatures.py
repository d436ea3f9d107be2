"""Images by the endings of their files and, where an ending says nothing, by their first bytes."""

import posixpath
import re

from firstlight.pipeline.data.images.formats import (
    AVIF_BRANDS,
    DICOM_MARK,
    DICOM_MARK_PLACE,
    HEIC_BRANDS,
    JPEG2000_CONTAINER,
    JPEG_SIGNATURE,
    JXL_CODESTREAM,
    JXL_CONTAINER,
    PNG_SIGNATURE,
    is_dicom,
)

# Images of formats that need an extra are listed, too, so that a folder of photos from a phone does not lose half of
# them silently.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".mpo", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".jp2", ".jxl"),
    *(".dcm", ".dicom"),
)
# Files with these endings are no images, and are not opened to find out; .dng and its like begin as a TIFF does
OTHER_SUFFIXES = {
    *(".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".log"),
    *(".md", ".rst", ".html", ".htm", ".css", ".js", ".py", ".ipynb", ".sh", ".bat", ".lock", ".pdf", ".doc", ".docx"),
    *(".xls", ".xlsx", ".ppt", ".pptx", ".zip", ".gz", ".tgz", ".tar", ".bz2", ".xz", ".7z", ".rar", ".zst", ".md5"),
    *(".npy", ".npz", ".pkl", ".pt", ".pth", ".h5", ".hdf5", ".mat", ".db", ".sqlite", ".parquet", ".arrow"),
    *(".feather", ".tfrecord", ".safetensors", ".onnx", ".mp4", ".avi", ".mov", ".mkv", ".webm", ".mp3", ".wav"),
    *(".m4a", ".svg", ".psd", ".eps", ".ai", ".xmp", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"),
    *(".srw", ".pef", ".part", ".crdownload", ".download", ".aria2"),
}
# Bytes that `is_image_start` looks at, and those of them that hold brands of an ISO base media file
SIGNATURE_BYTES, BRAND_BYTES = DICOM_MARK_PLACE + len(DICOM_MARK), 64
# The fewest bytes of a JPEG XL codestream that is taken for one: two bytes alone may begin anything
MIN_JXL_BYTES = 64
# Sizes of the second header of a BMP file, whose own signature is only two letters
BMP_HEADER_SIZES = {12, 40, 52, 56, 64, 108, 124}
PNM_START = re.compile(rb"P[1-6][ \t\r\n#]")
JPEG2000_CODESTREAM = b"\xff\x4f\xff\x51"


def find_ending(name: str) -> str:
    """Returns the ending of a file name in lower case, with its dot; "" if it has none."""
    return posixpath.splitext(name)[1].lower()


def is_image_start(start: bytes) -> bool:
    """Returns True if a file that begins with `start`, at least `SIGNATURE_BYTES` if it has as many, is an image."""
    if start.startswith((PNG_SIGNATURE, JPEG_SIGNATURE, b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return True
    if start.startswith((JXL_CONTAINER, JPEG2000_CONTAINER, JPEG2000_CODESTREAM)):
        return True
    if start[:4] == b"RIFF":
        return start[8:12] == b"WEBP"
    if start[4:8] == b"ftyp":
        brands = {start[k : k + 4] for k in range(8, BRAND_BYTES, 4)}
        return bool(brands & (HEIC_BRANDS | AVIF_BRANDS))
    if start[:2] == b"BM":
        return int.from_bytes(start[14:18], "little") in BMP_HEADER_SIZES
    if PNM_START.match(start) or is_dicom(start):
        return True
    return start.startswith(JXL_CODESTREAM) and len(start) >= MIN_JXL_BYTES
