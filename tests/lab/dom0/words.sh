# The words that scenarios are written in. Runs in dom0, in busybox's shell. BACKEND says who serves the devices: pcibackd, or stock for xen-pciback.
#
#   check "sentence" COMMAND...    runs the command (its output is shown if it fails) and says whether the sentence is true;
#                                  lines `VALUE ...` of its output are shown
#   must "sentence" COMMAND...     the same, and the scenario ends if it is not
#   has TEXT COMMAND...            succeeds if the command does and its output contains the text
#   lacks TEXT COMMAND...          succeeds if the command does and its output does not contain the text
#   no_wait COMMAND...             succeeds if the command does, and in less than the 10 s that libxl waits for a backend; the stock one may take its time
#   wait_for SECONDS COMMAND...    tries the command until it succeeds
#   start_backend, stop_backend    the daemon's log is $LOG; PCIBACKD_FLAGS are its flags
#   kill_backend, restart_killed   by SIGKILL; and started again
#   create_guest NAME LINE...      xl create, or what CREATE says, with these lines added to the configuration, /tmp/NAME.cfg; returns when the
#                                  guest takes commands
#   devices BDF...                 the line that gives a guest these devices
#   create_hvm_guest NAME LINE...  the same for an HVM guest
#   guest NAME COMMAND             runs a shell command in the guest: its output (the last 1500 bytes), its exit status (words: ../guest/words.sh)
#   tell NAME COMMAND              the same, and does not wait for it
#   nothing_left                   no guest has, or had, a PCI backend
#   no_zombie                      Xen has no guest, and nothing of one, after `destroy`
#   first_mib                      the checksum of its input's first MiB
#   bridge_up NAME ADDRESS         a bridge in dom0
#   shut_down NAME, destroy NAME   ends a guest and waits until xl is done with it

LOG=/var/log/pcibackd.log
STATE=/tmp/lab
mkdir -p $STATE
failures=0

check() {
  local sentence="$1" output status begin
  shift
  begin=$(hundredths)
  output=$("$@" 2>&1)
  status=$?
  if [ $status = 0 ]; then
    printf '  ok %6s s  %s\n' "$(seconds $(($(hundredths) - begin)))" "$sentence"
    echo "$output" | grep '^VALUE '
  else
    echo "  FAILED       $sentence"
    echo "$output (exit $status of: $*)" | tail -n 20 | sed 's/^/          | /'
    failures=$((failures + 1))
  fi
  return $status
}

# Time since boot in hundredths of a second, and how it reads
hundredths() { tr -d . </proc/uptime | cut -d' ' -f1; }
seconds() { printf '%d.%02d' $(($1 / 100)) $(($1 % 100)); }

must() { check "$@" || the_end; }

has() {
  local text="$1" output
  shift
  [ "$text" ] || { echo "there is no text to look for"; return 1; }
  output=$("$@" 2>&1) || { echo "$output"; return 1; }
  case "$output" in *"$text"*) ;; *) echo "no '$text' in: $output"; return 1 ;; esac
}

lacks() {
  local text="$1" output
  shift
  output=$("$@" 2>&1) || { echo "$output"; return 1; }
  case "$output" in *"$text"*) echo "'$text' in: $output"; return 1 ;; esac
}

not() { ! "$@"; }

no_wait() {
  local begin took
  begin=$(hundredths)
  "$@" || return
  took=$(($(hundredths) - begin))
  [ $took -lt 900 ] || [ $BACKEND = stock ] || { echo "it took $(seconds $took) s"; return 1; }
}

wait_for() {
  local deadline=$(($(date +%s) + $1))
  shift
  until "$@"; do
    [ "$(date +%s)" -lt $deadline ] || { echo "gave up waiting"; return 1; }
    sleep 0.1
  done
}

# each_change SECONDS NODE COMMAND...: runs the command now, and whenever the node changes, until it succeeds
each_change() {
  local fifo watch result=1 node="$2"
  fifo=$(mktemp -u $STATE/watch.XXXXXX)
  mkfifo "$fifo"
  timeout "$1" xenstore-watch "$node" >"$fifo" 2>&1 &
  watch=$!
  shift 2
  while read -r _; do "$@" && result=0 && break; done <"$fifo"
  kill $watch 2>/dev/null
  rm -f "$fifo"
  return $result
}

# --- the backend

start_backend() {
  case $BACKEND in
    stock) modprobe xen-pciback ;;
    *)
      pcibackd $PCIBACKD_FLAGS >>$LOG 2>&1 &
      echo $! >$STATE/pid
      wait_for 20 backend_is_ready ;;
  esac
}

kill_backend() { kill -9 "$(cat $STATE/pid)"; }

restart_killed() {
  kill_backend
  start_backend
}

backend_is_ready() { backend_runs && pciback status; }

# A zombie runs no program
backend_runs() { [ -e "/proc/$(cat $STATE/pid)/exe" ]; }

# Gives every device back to dom0 before it stops, so that the next backend, or scenario, finds the machine as it was
stop_backend() {
  local device failed=0
  for device in $(xl pci-assignable-list | cut -d' ' -f1); do xl pci-assignable-remove "$device" || failed=1; done
  case $BACKEND in
    stock) rmmod xen-pciback || failed=1 ;;
    *)
      kill "$(cat $STATE/pid)"
      wait_for 20 backend_is_gone || failed=1
      rm -f $STATE/pid ;;
  esac
  return $failed
}

# Without guests what keeps their taps and consoles ends, too
backend_is_gone() { ! backend_runs && ! pidof pcibackd-fdstore && ! grep -q ' /sys/bus/pci/drivers ' /proc/mounts; }

# --- guests

# swiotlb: a PV guest's memory is not where a device would look for it. The rest only saves time.
GUEST_KERNEL="console=hvc0 loglevel=4 iommu=soft swiotlb=force rodata=off mitigations=off"

create_guest() {
  local name="$1"
  shift
  run_guest "$name" 'type="pv"; kernel="/lab/vmlinux"; ramdisk="/lab/guest.img"; memory=256' "extra=\"$GUEST_KERNEL\"" "$@"
}

# It boots from a disk: a kernel and an image that are given to QEMU would come through a port, byte by byte. Several guests may have the disk at a time.
create_hvm_guest() {
  local name="$1"
  shift
  run_guest "$name" 'type="hvm"; memory=300; vga="none"; nographic=1; tsc_mode="native"' 'device_model_args_hvm=["-drive",
    "file=/lab/hvm.disk,if=none,id=boot,format=raw,file.locking=off", "-device", "ahci,id=ahci", "-device", "ide-hd,bus=ahci.0,drive=boot,bootindex=0"]' "$@"
}

run_guest() {
  local name="$1" line
  shift
  {
    echo "name=\"$name\""
    echo 'vcpus=1; on_poweroff="destroy"; on_crash="preserve"'
    for line in "$@"; do echo "$line"; done
  } | tr ';' '\n' >"/tmp/$name.cfg"
  ${CREATE:-xl create} "/tmp/$name.cfg" || return
  wait_for "${GUEST_TIMEOUT:-100}" guest_is_ready "$name"
}

devices() {
  local device list=""
  for device in "$@"; do list="$list\"$device\","; done
  echo "pci=[$list]"
}

guest_is_ready() { xenstore-exists "/local/domain/$(xl domid "$1")/data/ready"; }

# Commands go through xenstore: `data/command` holds a number and the command, the guest's init answers with `data/output` and, last, `data/result`.
# Watches on both sides: a guest that is being measured is not disturbed by anybody's polling.
guest() {
  local path number
  tell "$@" || return
  path=/local/domain/$(xl domid "$1")/data
  number=$(cat $STATE/number)
  each_change "${GUEST_TIMEOUT:-100}" "$path/result" guest_has_answered "$path/result" $number ||
    { echo "the guest does not answer"; return 124; }
  xenstore-read -R "$path/output" && echo
  return "$(xenstore-read "$path/result" | cut -d' ' -f2)"
}

tell() {
  local id
  id=$(xl domid "$1") || return
  shift
  echo $(($(cat $STATE/number 2>/dev/null) + 1)) >$STATE/number
  xenstore-write "/local/domain/$id/data/command" "$(cat $STATE/number) $(echo "$*" | sed 's/\\/\\\\/g')"
}

guest_has_answered() { case "$(xenstore-read "$1" 2>/dev/null)" in "$2 "*) ;; *) return 1 ;; esac; }

# reads_end NAME: ends what the guest began with start_reads; what came of them is in $STATE/reads
reads_end() {
  guest "$1" end_reads >$STATE/reads || return
  echo "VALUE $(cat $STATE/reads)"
}

shut_down() { xl shutdown "$1" >/dev/null && wait_for 60 guest_is_gone "$1"; }
destroy() { xl destroy "$1" && guest_is_gone "$1"; }
no_zombie() { [ "$(xl list | wc -l)" = 2 ]; }
guest_is_gone() { ! xl domid "$1" >/dev/null 2>&1; }
guests() { xl list | awk 'NR > 1 && $1 != "Domain-0" {print $1}'; }

# Of PCI backends in xenstore, empty directories included; and no device is a guest's in libxl's notes. What a guest notes in its own error
# directory is its affair: Linux complains there whenever its last device goes.
nothing_left() { ! xenstore-ls -f / | grep -vE '^/local/domain/[1-9][0-9]*/error/' | grep -E '/(backend|device)/pci|/libxl/pci/[^/]*/domid'; }

first_mib() { dd bs=64k count=16 iflag=fullblock 2>/dev/null | sha256sum | cut -d' ' -f1; }

# --- devices in dom0

bridge_up() {
  modprobe bridge && modprobe tun || return
  ip link add "$1" type bridge && ip addr add "$2/24" dev "$1" && ip link set "$1" up
}

driver_of() { basename "$(readlink "/sys/bus/pci/devices/$1/driver")"; }

# driven_by DRIVER BDF, reserved BDF: hidden, or to be hidden
driven_by() { [ "$(driver_of "$2")" = "$1" ]; }
reserved() { [ ! -e "/sys/bus/pci/devices/$1/driver" ] && [ "$(cat "/sys/bus/pci/devices/$1/driver_override")" = pciback ]; }

# dmesg_of DRIVER: what it has said
dmesg_of() { dmesg | grep "$1 "; }

# dom0_pings BDF: dom0's own driver has the card, and gets through
dom0_pings() {
  local interface
  interface=$(ls "/sys/bus/pci/devices/$1/net") || return
  ip link set "$interface" up
  ip addr add 10.0.2.15/24 dev "$interface"
  wait_for 10 grep -q 1 "/sys/class/net/$interface/carrier"
  ping -c 3 -A -W 5 10.0.2.2
  set -- $?
  ip addr flush dev "$interface"
  ip link set "$interface" down
  return "$1"
}

# --- how it ends

# Everything back as it was, so that the next scenario can use the machine
the_end() {
  local guest
  if [ $failures = 0 ]; then
    for guest in $(guests); do check "$guest ends" destroy "$guest"; done
    if [ -e $STATE/pid ] || [ -e /sys/module/xen_pciback ]; then check "the backend gives everything back and stops" stop_backend; fi
    rm -rf /etc/pciback
  fi
  [ $failures = 0 ] && exit 0
  post_mortem
  exit 1
}

post_mortem() {
  local file
  echo "--- xl list"; xl list
  echo "--- xenstore"; xenstore-ls -f /local/domain/0/backend | tail -n 60; xenstore-ls -f /local/domain/0/error 2>/dev/null
  for file in /var/log/xen/console/guest-*.log; do echo "--- $file"; tail -n 25 "$file"; done
  [ ! -e /var/log/xen/qemu-dm-hvm.log ] || { echo "--- the device model"; tail -n 15 /var/log/xen/qemu-dm-hvm.log; }
  echo "--- dom0's kernel"; dmesg | tail -n 15
  echo "--- Xen"; xl dmesg | tail -n 15
  [ ! -e $LOG ] || { echo "--- pcibackd"; tail -n 100 $LOG; }
  [ ! -e /run/systemd/system ] || { echo "--- the journal"; journalctl -b -u "pcibackd*"; systemctl --failed; systemd-analyze; dmesg | grep pciback; }
}
