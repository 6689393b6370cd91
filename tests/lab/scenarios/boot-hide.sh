# a Debian dom0 with our package boots from a disk: devices that are hidden at boot are never dom0's, and systemd keeps pcibackd up
ALONE=yes
DISK=yes
TIMEOUT=900
PREPARE="dpkg -i /pcibackd.deb && pciback hide --persist --next-boot 00:05.0"
KERNEL="xen-pciback.hide=(0000:00:06.*)(00:07)(00:08.0)"
story() {
  check "the initramfs has reserved the card of the configuration" reserved 0000:00:05.0
  check "before udev, whose rule would have done it, too" has 'pciback: 0000:00:05.0 is reserved' dmesg
  check "and those of the kernel's command line" reserved 0000:00:06.0
  check "behind its typo, too" reserved 0000:00:08.0
  check "which is told of on the console" has '(00:07) names no device' dmesg
  check "the driver is there for another card" driven_by e1000e 0000:01:00.0
  check "and never had this one" lacks '0000:00:05.0: ' dmesg_of e1000e

  must "pcibackd is up by systemd" has active systemctl is-active pcibackd
  check "it is ordered before what starts guests" has xendomains.service systemctl show -P Before pcibackd
  check "and so is what lays its directory" has xendomains.service systemctl show -P Before pcibackd-facade
  check "which was there before those began" ready_before_guests
  must "xl lists the first, without a wait" has 0000:00:05.0 xl pci-assignable-list
  check "and the others" has 0000:00:06.0 xl pci-assignable-list
  check "the disk, too" has 0000:00:08.0 xl pci-assignable-list
  check "the kernel's pciback is not loaded" [ ! -e /sys/module/xen_pciback ]
  check "and does not come by its alias" lacks xen_pciback modprobe_alias
  check "the package has brought manual pages" grep -q persist /usr/share/man/man1/pciback-hide.1
  check "the daemon's, too" grep -q SIGHUP /usr/share/man/man8/pcibackd.8
  check "and completions" grep -q persist /usr/share/bash-completion/completions/pciback
  check "no unit has failed" no_unit_failed

  check "a device that comes again without its reservation gets it back by the udev rule" the_rule_reserves 0000:00:05.0

  check "it cannot write to what is not its own" not in_its_sandbox touch /etc/pciback/x /usr/x /root/x
  check "though it can to its own" in_its_sandbox touch /run/pcibackd/x
  check "from a sandbox like its own, a command runs on the host" from_a_sandbox
  check "and a file is made read-only for the host, which the sandbox sees" kept_from_a_sandbox

  check "where what keeps guests' taps and consoles is reached, systemd listens" has active systemctl is-active pcibackd-fdstore.socket
  check "for root alone" has 600 stat -c %a /run/pcibackd/fdstore
  check "it does not run, as no guest has any" has inactive inactive_store
  check "it is started when the daemon asks it for those of a guest" the_store_starts
  check "in a sandbox of its own, which takes everything from it" has CapEff:0000000000000000 of_the_store
  check "it ends when it keeps nothing and the daemon is gone" the_store_ends

  must "killed, it is brought back by systemd" killed_it_comes_back
  check "and xl finds the devices" wait_for 20 has 0000:00:05.0 xl pci-assignable-list
  check "in its driver's directory" timeout 5 ls /sys/bus/pci/drivers/pciback/0000:00:05.0
  check "whoever keeps that is brought back, too" the_keeper_comes_back
  check "and xl finds the devices again" wait_for 20 has 0000:00:05.0 xl pci-assignable-list
  check "stopped, nothing of it lies over the drivers" stopped_it_is_gone
  check "started, it is there" systemctl start pcibackd
  check "and the devices with it" wait_for 20 has 0000:00:08.0 xl pci-assignable-list

  check "pciback takes the card out of the next boot, and gives it back now" pciback unhide --persist --no-initramfs 00:05.0
  check "to dom0's driver" driven_by e1000e 0000:00:05.0
  check "no udev rule is left" [ ! -e /etc/udev/rules.d/10-pciback.rules ]

  # An initramfs with all drivers takes minutes here
  echo MODULES=list >/etc/initramfs-tools/conf.d/lab
  check "dom0's driver has another card" driven_by e1000e 0000:01:00.0
  check "it is hidden now and at every boot" pciback hide --persist 01:00.0
  check "it is the driver's no more" reserved 0000:01:00.0
  check "xl lists it" has 0000:01:00.0 xl pci-assignable-list
  check "the configuration has it" grep '^hide.*01:00.0' /etc/pciback/pcibackd.toml
  check "the udev rule has it" grep 0000:01:00.0 /etc/udev/rules.d/10-pciback.rules
  check "the initramfs has it" has 0000:01:00.0 initramfs_list
  check "it is given back now and at every boot" pciback unhide --persist 01:00.0
  check "it is the driver's again" driven_by e1000e 0000:01:00.0
  check "the configuration does not have it" not grep '^hide.*01:00.0' /etc/pciback/pcibackd.toml
  check "nor is there a udev rule" [ ! -e /etc/udev/rules.d/10-pciback.rules ]
  check "nor has the initramfs it" lacks 0000:01:00.0 initramfs_list
}

no_unit_failed() { ! systemctl --failed --plain --no-legend | grep .; }
modprobe_alias() { modprobe xen-backend:pci; lsmod; }

# Type=notify: it is active when the devices are there
ready_before_guests() {
  local ready begun
  ready=$(systemctl show -P ActiveEnterTimestampMonotonic pcibackd-facade)
  begun=$(systemctl show -P InactiveExitTimestampMonotonic xendomains)
  echo "ready after $ready us, guests after $begun us"
  [ "$ready" -gt 0 ] && [ "$begun" -gt "$ready" ]
}

# As when it is found: the rule is for what is added
the_rule_reserves() {
  local device=/sys/bus/pci/devices/$1
  echo >"$device/driver_override" && not reserved "$1" && udevadm trigger --settle -c add "$device" && reserved "$1"
}

# What the initramfs reserves
initramfs_list() {
  rm -rf /tmp/initramfs
  unmkinitramfs "$(readlink -f /initrd.img)" /tmp/initramfs && cat "$(find /tmp/initramfs -path '*usr/lib/pciback/hide')"
}

killed_it_comes_back() {
  local before
  before=$(systemctl show -P MainPID pcibackd)
  systemctl kill -s KILL pcibackd
  wait_for 30 another_runs "$before" pcibackd && wait_for 20 pciback status
}

another_runs() {
  local now
  now=$(systemctl show -P MainPID "$2")
  [ "$now" != 0 ] && [ "$now" != "$1" ]
}

inactive_store() { systemctl is-active pcibackd-fdstore.service; true; }

# The record of a guest that is gone
the_store_starts() {
  mkdir -p /run/pcibackd/virtual/9999-0
  systemctl restart pcibackd
  wait_for 20 has active systemctl is-active pcibackd-fdstore.service && [ ! -e /run/pcibackd/virtual/9999-0 ]
}

of_the_store() { tr -d '\t' <"/proc/$(systemctl show -P MainPID pcibackd-fdstore)/status"; }

the_store_ends() {
  systemctl restart pcibackd
  wait_for 20 has inactive inactive_store
}

in_its_sandbox() { nsenter -m -t "$(systemctl show -P MainPID pcibackd)" "$@"; }

# As the daemon runs programs on the host
on_the_host() {
  systemd-run --quiet --collect --service-type=oneshot -p NoNewPrivileges=yes -p "CapabilityBoundingSet=CAP_SYS_ADMIN CAP_SYS_RESOURCE" \
    -p ProtectSystem=strict -p RestrictAddressFamilies=AF_UNIX -p SystemCallFilter=@system-service -p DevicePolicy=closed \
    systemd-run --quiet --collect --service-type=oneshot --property=TimeoutStartSec=115 -- "$@"
}

from_a_sandbox() { on_the_host sh -c 'xl list >/root/domains' && grep Domain-0 /root/domains; }

# As it keeps virtual functions that guests have
kept_from_a_sandbox() {
  local file=/sys/devices/pci0000:00/0000:00:05.0/driver_override kept=1
  on_the_host mount --bind -o ro "$file" "$file" || return 1
  in_its_sandbox grep -q "$file" /proc/self/mountinfo && not sh -c "echo pciback >$file" || kept=0
  on_the_host umount --lazy "$file"
  [ $kept = 1 ] && not in_its_sandbox grep -q "$file" /proc/self/mountinfo && echo pciback >"$file"
}

the_keeper_comes_back() {
  local before
  before=$(systemctl show -P MainPID pcibackd-facade)
  systemctl kill -s KILL pcibackd-facade
  wait_for 30 another_runs "$before" pcibackd-facade
}

stopped_it_is_gone() {
  systemctl stop pcibackd
  not grep pciback /proc/mounts && has pcieport ls /sys/bus/pci/drivers
}
