#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# strip.sh RELEASE: runs in the root directory that the debug kernel was built in, and leaves there
# what building modules takes, under the name that the trees of Debian's kernels have for it too.

set -e
mkdir -p "/lib/modules/$1"
ln -s /usr/src/build "/lib/modules/$1/build"

cd /usr/src/linux
# keep DIR NAMES: removes all other directories in DIR.
keep() {
	for path in "$1"/*/; do
		name=${path%/}
		name=${name##*/}
		case " $2 " in
		*" $name "*) ;;
		*) rm -rf "$path" ;;
		esac
	done
}
keep . 'arch include scripts tools'
keep arch x86
keep tools include

# objtool and modpost stay: modules are processed by them.
cd /usr/src/build
find . -type f \( -name '*.o' -o -name '*.a' -o -name '*.ko' -o -name '.*.cmd' -o -name 'vmlinux*' \) \
	! -path './scripts/*' ! -path './tools/*' -delete
