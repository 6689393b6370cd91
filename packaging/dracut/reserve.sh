#!/bin/sh
# dracut: its hooks are read into its own shell
/usr/lib/pciback/reserve /usr/lib/pciback/hide
