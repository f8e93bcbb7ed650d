#!/bin/sh
# Prepare the data of the study docs-llama from four manuals of Debian 12, which are four domains:
#
#   sh benchmarks/manuals.sh data/docs-llama
#
# writes data/docs-llama/whole (with a part of each domain) and data/docs-llama/dev, whose validation documents are held out
# from the training documents of the former. The packages are downloaded with apt-get, unless their .deb files are in the
# folder already. Left out are what is in a manual twice: the sources of its pages, and the index of its terms.
set -eu
packages="python3.11-doc postgresql-doc-15 sqlite3-doc python-django-doc"
mkdir -p "$1"
cd "$1"
mkdir -p manuals
for package in $packages; do
    set -- "${package}"_*.deb
    [ -e "$1" ] || apt-get download "$package"
    dpkg-deb -x "${package}"_*.deb "manuals/$package"
done
find manuals \( -path '*/_sources/*' -o -name 'genindex*' \) -type f -delete
options="--window 256 --domain-bytes 4000000 --val-fraction 0.01 --parts 4 --balanced domain"
# shellcheck disable=SC2086 # these are several words
bigincubate data prepare manuals --out whole $options
# shellcheck disable=SC2086
bigincubate data prepare manuals --out dev $options --development
