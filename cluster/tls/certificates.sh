#!/bin/sh
# Certificates for Ray's TLS: `sh certificates.sh AUTHORITY MACHINE [NAME|ADDRESS ...]`.
# Makes the cluster's own authority in the folder AUTHORITY, once; its ca.key stays with you, on no machine. Then makes
# what one machine needs in the folder MACHINE: ca.crt, tls.crt, tls.key, for the names and addresses it is known by
# (default: localhost, 127.0.0.1). Whoever has a certificate of this authority is let in.
set -eu
usage="usage: certificates.sh AUTHORITY MACHINE [NAME|ADDRESS ...]"
authority=${1:?$usage}
machine=${2:?$usage}
shift 2
[ $# -gt 0 ] || set -- localhost 127.0.0.1
umask 077
mkdir -p "$authority" "$machine"

if [ ! -f "$authority/ca.key" ]; then
    openssl req -x509 -newkey rsa:3072 -sha256 -nodes -days 365 -subj "/CN=raysys cluster authority" \
        -addext keyUsage=critical,keyCertSign,cRLSign \
        -keyout "$authority/ca.key" -out "$authority/ca.crt" 2>/dev/null
fi

names=""
for name in "$@"; do
    case $name in
        *:*) kind=IP ;;
        *[!0-9.]*) kind=DNS ;;
        *) kind=IP ;;
    esac
    names="$names${names:+,}$kind:$name"
done
openssl req -new -newkey rsa:3072 -nodes -subj "/CN=raysys machine" \
    -keyout "$machine/tls.key" -out "$machine/tls.csr" 2>/dev/null
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\n' "$names" >"$machine/tls.ext"
openssl x509 -req -sha256 -days 90 -in "$machine/tls.csr" -CA "$authority/ca.crt" -CAkey "$authority/ca.key" \
    -CAcreateserial -extfile "$machine/tls.ext" -out "$machine/tls.crt" 2>/dev/null
rm -f "$machine/tls.csr" "$machine/tls.ext"
cp "$authority/ca.crt" "$machine/ca.crt"
echo "$machine: tls.crt for $names"
