"""A certificate for loopback, and its key: whoever has this repository has both, so nothing else may trust them."""

from __future__ import annotations

from pathlib import Path

# Self-signed for localhost and 127.0.0.1, from 2020 to 2120: openssl ca -selfsign -startdate … -enddate …
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg3kaHMiQDkZ5QWfo2
ahAHhruHzHIbJ12QkpJDVR4EWOOhRANCAASTLA0+xI2mYKjS+JSBMvPg2JtmgGLB
tnFngRbTmWTtypPZWUJQysUA3jk4Axo2OO72ZN7eTfJ0sg+m+ePIgRU4
-----END PRIVATE KEY-----
"""
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBZzCCAQ2gAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQxEjAQBgNVBAMM
CWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABJMsDT7EjaZgqNL4
lIEy8+DYm2aAYsG2cWeBFtOZZO3Kk9lZQlDKxQDeOTgDGjY47vZk3t5N8nSyD6b5
48iBFTijTjBMMBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAPBgNVHRMBAf8E
BTADAQH/MB0GA1UdDgQWBBTzBWTy+/KYaiHAugRm1sfSUkM3GzAKBggqhkjOPQQD
AgNIADBFAiEAlzWU7ugqJc9ZZjFHKFKjvHAE7gZvn4TdeeoOkb6FFe8CICvHu03+
N/zAaoBO1IprN+FbxTJeB9KpgqAPMNWfGwQL
-----END CERTIFICATE-----
"""


def write_certificate(directory: Path) -> tuple[Path, Path]:
    """The files of the certificate and of its key."""
    certificate, key = directory / "loopback.pem", directory / "loopback.key"
    certificate.write_text(CERTIFICATE, encoding="ascii")
    key.write_text(KEY, encoding="ascii")
    return certificate, key
