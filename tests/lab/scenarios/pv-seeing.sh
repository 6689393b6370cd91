# a guest's operations are traced, counted, timed and scraped while it works; a trace that has ended leaves nothing behind
story() {
  [ $BACKEND = stock ] && return
  mkdir -p /etc/pciback
  echo 'metrics = "127.0.0.1:9465"' >/etc/pciback/pcibackd.toml
  must "the backend starts" start_backend
  check "xl takes the card" xl pci-assignable-add 00:05.0
  must "a guest starts with it" create_guest pv 'pci=["00:05.0"]'

  pciback trace pv --output /tmp/trace.json 2>/tmp/trace.log &
  echo $! >$STATE/trace
  must "a trace is on" wait_for 20 has ", traced" pciback status
  check "the guest reads all of the card's registers" guest pv 'lspci -xxx -s 00:00.0'
  check "and writes two" guest pv 'setpci -s 00:00.0 COMMAND=0006; setpci -s 00:00.0 HEADER_TYPE=80'
  check "the trace ends by Ctrl-C" end_trace
  check "it has missed nothing" grep -q 'none was missed' /tmp/trace.log
  check "it has reads by the registers' names" traced '"command":"conf_read".*"name":"MSI-X Message Control"'
  check "writes by the fields' names" traced '"command":"conf_write".*"name":"Bus Master Enable"'
  check "and what was dropped" traced '"name":"Header Type".*"outcome":"dropped"'
  check "no thread of it is left" lacks command threads
  check "nobody is traced" lacks ", traced" pciback status

  check "the status shows what the guest did" has "writes dropped" pciback status
  check "and how long it took" has "99 % within" pciback status
  check "the list counts the card's resets: when it was hidden, and xl's own" has "(resets 2)" resets
  check "the port tells the same to a scraper" has 'name="pv",command="conf_write"} ' wget -q -O - http://127.0.0.1:9465/metrics
  check "and so does the socket" has 'pciback_dropped_writes_total{domain="'"$(xl domid pv)"'",name="pv"} ' pciback metrics
  check "the guest shuts down" shut_down pv
}

end_trace() {
  kill -INT "$(cat $STATE/trace)"
  wait_for 20 not [ -e "/proc/$(cat $STATE/trace)/exe" ]
}

traced() { grep "$1" /tmp/trace.json | head -n 1 | cut -c 1-400 | grep .; }

threads() { cat /proc/"$(cat $STATE/pid)"/task/*/comm; }

resets() { pciback list --json | awk -F '[:,]' '/"device": *"0000:00:05.0"/ {mine = 1} mine && /"resets"/ {print "(resets" $2 ")"; exit}'; }
