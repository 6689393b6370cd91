# What is made once: the packages on this machine, a Debian tree to take dom0's and the guests' programs from, and the kernels.
# Sourced by ../run. Several labs may run at a time on one cache: a lock keeps them from making the same thing twice.
# shellcheck shell=bash disable=SC2154
root=$cache/root     # a Debian bookworm tree
kernel=$cache/kernel # Debian's kernel (boot, modules, vmlinux) and hypervisor, unpacked

setup() {
  mkdir -p "$cache" "$logs"
  exec 9>"$cache/lock"
  flock 9
  install_packages
  [[ -e $root/.done ]] || make_root
  [[ -e $kernel/.done ]] || fetch_kernel
  [[ -e $kernel/vmlinux ]] || unpack_vmlinux
  flock -u 9
}

# The mirror that this machine's apt uses for Debian itself
mirror() {
  local uri
  uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' 'Label: Debian' 2>/dev/null | sed -n 1p)
  echo "${uri:-http://deb.debian.org/debian}"
}

install_packages() {
  local need=()
  command -v debootstrap >/dev/null || need+=(debootstrap)
  command -v cpio >/dev/null || need+=(cpio)
  command -v as >/dev/null || need+=(binutils)
  command -v modprobe >/dev/null || need+=(kmod)
  command -v xz >/dev/null || need+=(xz-utils)
  command -v mke2fs >/dev/null || need+=(e2fsprogs)
  [[ -x /bin/busybox ]] && ! ldd /bin/busybox >/dev/null 2>&1 || need+=(busybox-static)
  # bookworm's own QEMU has no igb and is too old for Xen's PV guests with VT-d interrupt remapping: take the one from backports
  qemu-system-x86_64 -device help 2>/dev/null | grep '"igb"' >/dev/null || need+=(qemu-system-x86 seabios)
  ((${#need[@]})) || return 0
  echo "lab: installing ${need[*]}"
  apt-get update -qq
  if ! apt-cache policy | grep n=bookworm-backports >/dev/null; then
    printf 'Types: deb\nURIs: %s\nSuites: bookworm-backports\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n' \
      "$(mirror)" >/etc/apt/sources.list.d/bookworm-backports.sources
    apt-get update -qq
  fi
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends -t bookworm-backports "${need[@]}" >"$logs/apt.log" 2>&1 ||
    { tail -n 20 "$logs/apt.log"; return 1; }
}

make_root() {
  local log=$logs/debootstrap.log uri
  uri=$(mirror)
  echo "lab: making the Debian tree $root (once; log in $log)"
  rm -rf "$root"
  {
    debootstrap --variant=minbase --include=xen-utils-4.17,xenstore-utils,kmod,iproute2,pciutils,strace bookworm "$root" "$uri"
    printf 'deb %s bookworm main\ndeb %s bookworm-updates main\n' "$uri" "$uri" >"$root/etc/apt/sources.list"
    chroot "$root" apt-get update -qq
    # not needed by PV guests, but by HVM guests: their device model and firmware
    DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get install -y -qq --no-install-recommends qemu-system-xen qemu-system-x86 seabios
  } >"$log" 2>&1 </dev/null || { tail -n 20 "$log"; return 1; }
  touch "$root/.done"
}

fetch_kernel() {
  local image
  echo "lab: fetching Debian's kernel and hypervisor into $kernel (once)"
  rm -rf "$kernel"
  mkdir -p "$kernel/debs"
  image=$(chroot "$root" apt-cache depends linux-image-amd64 | grep -oE 'linux-image-6\.1\.[^ ]+-amd64' | sed -n 1p)
  rm -rf "$root/tmp/debs" && mkdir -m 777 "$root/tmp/debs"
  chroot "$root" sh -c "cd /tmp/debs && apt-get download -qq $image xen-hypervisor-4.17-amd64"
  mv "$root"/tmp/debs/*.deb "$kernel/debs/"
  for deb in "$kernel"/debs/*.deb; do dpkg -x "$deb" "$kernel"; done
  depmod -b "$kernel" "$(ls "$kernel/lib/modules")"
  cp "$kernel"/boot/vmlinuz-* "$kernel/vmlinuz"
  zcat "$kernel"/boot/xen-4.17-amd64.gz >"$kernel/xen" # QEMU's multiboot loader wants it unpacked
  touch "$kernel/.done"
}

# The kernel without its xz wrapping: unpacking that under emulation would cost every boot and every `xl create` some seconds.
# Offsets of the x86 boot protocol's header: setup_sects 0x1f1, payload_offset 0x248, payload_length 0x24c.
unpack_vmlinux() {
  local image=$kernel/vmlinuz sectors start length
  sectors=$(od -An -tu1 -j $((0x1f1)) -N1 "$image")
  read -r start length < <(od -An -tu4 -j $((0x248)) -N8 "$image")
  dd if="$image" iflag=skip_bytes,count_bytes skip=$(((sectors + 1) * 512 + start)) count="$length" bs=1M status=none |
    xz -dc --single-stream >"$kernel/vmlinux.part"
  mv "$kernel/vmlinux.part" "$kernel/vmlinux"
}
