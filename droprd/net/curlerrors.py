"""What an error of libcurl means: its kind, the cause in plain words, and what to do.

Guarantees that every libcurl error gets one of the kinds of `TransportError`; those not named here
are faults of the protocol.
"""

from __future__ import annotations

import errno
import os

import pycurl

from droprd.net.transport import Request, TransportErrorKind, TransportOptions

BROKEN = frozenset({pycurl.E_GOT_NOTHING, pycurl.E_SEND_ERROR, pycurl.E_RECV_ERROR})
"""How a kept connection shows that the peer has closed it."""
_TLS = frozenset(
    {
        pycurl.E_SSL_CONNECT_ERROR,
        pycurl.E_PEER_FAILED_VERIFICATION,
        pycurl.E_SSL_CERTPROBLEM,
        pycurl.E_SSL_CIPHER,
        pycurl.E_SSL_CACERT_BADFILE,
        pycurl.E_SSL_CRL_BADFILE,
        pycurl.E_SSL_ISSUER_ERROR,
        pycurl.E_USE_SSL_FAILED,
    }
)
_CERTIFICATE_HINT = "if the peer requires a certificate, give it cert_file and key_file"
_OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def explain(
    code: int, text: str, curl: pycurl.Curl, request: Request, options: TransportOptions
) -> tuple[TransportErrorKind, str, str]:
    """(kind, why, hint) of a libcurl error."""
    https = request.url.startswith("https:")
    system_error = int(curl.getinfo(pycurl.OS_ERRNO))
    if https and ("certificate required" in text or "handshake failure" in text):
        return "auth", text, _CERTIFICATE_HINT
    ended = code == pycurl.E_GOT_NOTHING or "unexpected eof" in text
    if ended and https and not options.cert_file and not curl.getinfo(pycurl.RESPONSE_CODE):
        # Under TLS 1.3 the client is through with the handshake before the server looks at its
        # certificate: that none was given shows only as an end without an answer.
        return (
            "auth" if request.token is None else "reset",
            "the peer closed the connection without an answer, as one does that requires a client "
            "certificate",
            _CERTIFICATE_HINT,
        )
    if code == pycurl.E_COULDNT_RESOLVE_HOST:
        return "resolve", text, "check the name in the peer's url, and this node's name servers"
    if code in (pycurl.E_COULDNT_CONNECT, pycurl.E_INTERFACE_FAILED):
        if system_error in _OUT_OF_DESCRIPTORS:
            return "local", os.strerror(system_error), "raise the limit of open files"
        why = text or os.strerror(system_error)
        return "connect", why, "check that the peer runs and that no firewall is between"
    if code == pycurl.E_OPERATION_TIMEDOUT:
        if not curl.getinfo(pycurl.PRETRANSFER_TIME):
            why = f"no connection within {request.connect_timeout_s:g} s"
            return "timeout", why, "check that the peer runs and that no firewall is between"
        return (
            "timeout",
            f"fewer than {request.low_speed_bytes_s} bytes a second for {request.low_speed_s} s",
            "",
        )
    if code in _TLS:
        return "tls", text, "check the peer's certificate, this node's clock, and ca_file"
    if code in (pycurl.E_SEND_ERROR, pycurl.E_RECV_ERROR, pycurl.E_PARTIAL_FILE):
        return "reset", text or "the connection was broken off", ""
    if code == pycurl.E_GOT_NOTHING:
        return "reset", "the peer closed the connection without an answer", ""
    if code in (pycurl.E_SEND_FAIL_REWIND, pycurl.E_AGAIN):
        return "reset", text, ""
    if code in (pycurl.E_OUT_OF_MEMORY, pycurl.E_READ_ERROR, pycurl.E_ABORTED_BY_CALLBACK):
        return "local", text, ""
    if code == pycurl.E_URL_MALFORMAT:
        return "local", text, "correct the peer's url"
    return "protocol", text or f"libcurl error {code}", "check that a droprd answers there"
