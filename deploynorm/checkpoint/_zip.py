"""Zip archives of torch: whether one is whole, by the checksums of its members, which torch itself does not compare."""

from __future__ import annotations

import io
import zipfile

from deploynorm.checkpoint._limits import check_archive
from deploynorm.errors import ModelError


def whole_members(data: bytes, where: str) -> list[str]:
    """The names of an archive's members, each of which has the checksum that the archive has for it.

    None of a file that is no zip archive. torch too recognises one by these bytes alone: both must decide alike.

    Raises:
        ModelError: The archive is cut short, a member of it is damaged, or it holds more than any network.
    """
    if data[:4] != b"PK\x03\x04":
        return []
    fix = "copy, download or write the file again"
    name = ""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            check_archive(archive, len(data), where)
            for member in archive.infolist():
                name = member.filename
                read_member(archive, member)
            return archive.namelist()
    except ModelError:
        raise
    except Exception as error:  # zipfile lets struct, unicode and overflow errors through on damaged files
        if name:
            problem = "the file is damaged: a member of it is not what was written"
            raise ModelError(where, problem, got=name, fix=fix) from error
        raise ModelError(where, "a damaged or cut-short zip archive", fix=fix) from error


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """The bytes of a member; BadZipFile if they have not its checksum.

    Where torch was told to write none (torch.serialization.set_crc32_options) it is 0, and nothing is compared.
    """
    with archive.open(member) as content:
        if member.CRC == 0:
            content._expected_crc = None  # type: ignore[attr-defined]
        return content.read()
