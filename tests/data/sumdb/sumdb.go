// Read a log with nothing but the code of the Go checksum database: head, tiles, proofs, a receipt.
//
//	sumdb LOG VKEY RECEIPT REQUEST
//
// LOG holds `checkpoint`, `tile/` and `seg/`. Tiles are read through tlog.TileHashReader, which
// checks each against the signed root; every record is then proved from them.
package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

type tiles struct{ folder string }

func (t tiles) Height() int { return 8 }

func (t tiles) ReadTiles(want []tlog.Tile) ([][]byte, error) {
	var found [][]byte
	for _, each := range want {
		name := fmt.Sprintf("%03d", each.N%1000)
		for n := each.N / 1000; n > 0; n /= 1000 {
			name = fmt.Sprintf("x%03d/%s", n%1000, name)
		}
		if each.W < 256 {
			name += ".p/" + strconv.Itoa(each.W)
		}
		content, err := os.ReadFile(filepath.Join(t.folder, strconv.Itoa(each.L), name))
		if err != nil {
			return nil, err
		}
		found = append(found, content)
	}
	return found, nil
}

func (t tiles) SaveTiles([]tlog.Tile, [][]byte) {}

func must(err error) {
	if err != nil {
		fmt.Println("FAIL", err)
		os.Exit(1)
	}
}

func read(path string) []byte {
	content, err := os.ReadFile(path)
	must(err)
	return content
}

func open(content []byte, verifier note.Verifier) (int64, tlog.Hash) {
	opened, err := note.Open(content, note.VerifierList(verifier))
	must(err)
	lines := strings.Split(opened.Text, "\n")
	if lines[0] != verifier.Name() {
		must(fmt.Errorf("origin %s", lines[0]))
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	must(err)
	root, err := tlog.ParseHash(lines[2])
	must(err)
	return size, root
}

func hashes(lines []string) (found []tlog.Hash) {
	for _, line := range lines {
		h, err := tlog.ParseHash(line)
		must(err)
		found = append(found, h)
	}
	return found
}

func main() {
	verifier, err := note.NewVerifier(strings.TrimSpace(string(read(os.Args[2]))))
	must(err)
	size, root := open(read(filepath.Join(os.Args[1], "checkpoint")), verifier)
	reader := tlog.TileHashReader(tlog.Tree{N: size, Hash: root}, tiles{filepath.Join(os.Args[1], "tile")})

	files, err := filepath.Glob(filepath.Join(os.Args[1], "seg", "*.jsonl"))
	must(err)
	records := int64(0)
	for _, name := range files {
		scanner := bufio.NewScanner(bytes.NewReader(read(name)))
		scanner.Buffer(make([]byte, 1<<16), 1<<16)
		for scanner.Scan() && records < size {
			proof, err := tlog.ProveRecord(size, records, reader)
			must(err)
			must(tlog.CheckRecord(proof, size, root, records, tlog.RecordHash(scanner.Bytes())))
			records++
		}
	}
	if records != size {
		must(fmt.Errorf("%d records of %d", records, size))
	}
	for old := int64(1); old <= size; old += 37 {
		proof, err := tlog.ProveTree(size, old, reader)
		must(err)
		before, err := tlog.TreeHash(old, reader)
		must(err)
		must(tlog.CheckTree(proof, size, root, old, before))
	}

	receipt := strings.SplitN(string(read(os.Args[3])), "\n\n", 2)
	lines := strings.Split(receipt[0], "\n")
	index, err := strconv.ParseInt(strings.TrimPrefix(lines[2], "index "), 10, 64)
	must(err)
	then, rootThen := open([]byte(receipt[1]), verifier)
	leaf := hashes([]string{strings.TrimPrefix(lines[1], "extra ")})[0]
	must(tlog.CheckRecord(hashes(lines[3:]), then, rootThen, index, leaf))

	request := strings.SplitN(string(read(os.Args[4])), "\n\n", 2)
	lines = strings.Split(request[0], "\n")
	old, err := strconv.ParseInt(strings.TrimPrefix(lines[0], "old "), 10, 64)
	must(err)
	now, rootNow := open([]byte(request[1]), verifier)
	before, err := tlog.TreeHash(old, reader)
	must(err)
	must(tlog.CheckTree(hashes(lines[1:]), now, rootNow, old, before))
	fmt.Println("OK", size, index, old)
}
