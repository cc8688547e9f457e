#!/bin/sh
# Leaves tinyshakespeare as input.txt beside this script (README.md says more).
# Looks at, in turn: input.txt, $TINYSHAKESPEARE, ../shared beside the checkout, the network.
set -eu

url=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
sum=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
size=1115394

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
out=$here/input.txt
shared=${here%/*/*}/shared/tinyshakespeare/input.txt
tmp=$out.$$.tmp
told=

trap 'rm -f "$tmp"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

say() {
    printf 'fetch.sh: %s\n' "$1" >&2
}

has() {
    command -v "$1" >/dev/null 2>&1
}

# digest FILE: its sha256, in hex
digest() {
    if has sha256sum; then
        sha256sum <"$1"
    elif has shasum; then
        shasum -a 256 <"$1"
    else
        openssl dgst -sha256 <"$1"
    fi | sed 's/.*= *//; s/ .*//'
}

# good FILE NAME: is FILE tinyshakespeare? If not, says that NAME was wrong.
good() {
    if has sha256sum || has shasum || has openssl; then
        [ "$(digest "$1")" != "$sum" ] || return 0
        say "wrong sha256, not used: $2"
        return 1
    fi
    if [ -z "$told" ]; then
        say 'no sha256sum, shasum or openssl: checking the size alone'
        told=1
    fi
    [ $(($(wc -c <"$1"))) -ne "$size" ] || return 0
    say "wrong size, not used: $2"
    return 1
}

# finish NAME: if the temporary file is good, it becomes input.txt and we are done.
finish() {
    good "$tmp" "$1" || return 0
    mv -f "$tmp" "$out"
    printf '%s: from %s\n' "$out" "$1"
    exit 0
}

# take FILE: finish with a copy of FILE
take() {
    if [ ! -f "$1" ]; then
        say "no such file: $1"
    elif cat 2>/dev/null <"$1" >"$tmp"; then
        finish "$1"
    else
        say "cannot copy $1 to $here"
    fi
}

if [ -d "$out" ]; then
    say "a folder is in the way: $out"
    exit 1
fi
if [ -f "$out" ] && good "$out" "$out"; then
    exit 0
fi
tried=$out

if [ -n "${TINYSHAKESPEARE:-}" ]; then
    tried="$tried, $TINYSHAKESPEARE"
    take "$TINYSHAKESPEARE"
fi

tried="$tried, $shared"
if [ -f "$shared" ]; then
    take "$shared"
fi

rc=0
if has curl; then
    # 30 s to connect, 10 s without data, 5 minutes in all
    curl -fsL --connect-timeout 30 --speed-limit 1 --speed-time 10 --max-time 300 \
        -o "$tmp" "$url" 2>/dev/null || rc=$?
    tried="$tried, curl $url (exit $rc)"
elif has wget; then
    # 10 s for each step; short options, for BusyBox
    wget -q -t 1 -T 10 -O "$tmp" "$url" 2>/dev/null || rc=$?
    tried="$tried, wget $url (exit $rc)"
else
    rc=127
    tried="$tried, no curl or wget to download with"
fi
if [ "$rc" -eq 0 ] && [ -f "$tmp" ]; then
    finish "$url"
fi

say "no input.txt; tried $tried; put the file at $out or set TINYSHAKESPEARE to its path"
exit 1
