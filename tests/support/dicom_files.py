"""DICOM files that tests make, and those that pydicom brings."""

import io
from typing import Any

import numpy as np
from pydicom import FileDataset
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

# A secondary capture, the plainest kind of image.
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def encode_dicom(values: np.ndarray, **elements: Any) -> bytes:
    """(H, W), (H, W, 3) or (frames, H, W, 1) values of 8 or 16 bits -> a DICOM file with other `elements` besides."""
    frames = values.shape[0] if values.ndim == 4 else 0
    height, width = values.shape[1:3] if frames else values.shape[:2]
    samples = 3 if values.ndim == 3 else 1
    bits = 8 * values.dtype.itemsize
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SECONDARY_CAPTURE, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    made.SOPClassUID, made.SOPInstanceUID = SECONDARY_CAPTURE, meta.MediaStorageSOPInstanceUID
    made.Rows, made.Columns, made.SamplesPerPixel = height, width, samples
    made.PhotometricInterpretation = "RGB" if samples == 3 else "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit = bits, bits, bits - 1
    made.PixelRepresentation = int(values.dtype.kind == "i")
    if samples == 3:
        made.PlanarConfiguration = 0
    if frames:
        made.NumberOfFrames = frames
    made.PixelData = values.tobytes() + bytes(values.nbytes % 2)
    for name, value in elements.items():
        setattr(made, name, value)
    file = io.BytesIO()
    made.save_as(file, enforce_file_format=True)
    return file.getvalue()


def read_packaged_dicom(name: str) -> bytes:
    """Returns a file that comes with pydicom."""
    path = get_testdata_file(name, download=False)
    assert isinstance(path, str), name
    with open(path, "rb") as file:
        return file.read()
