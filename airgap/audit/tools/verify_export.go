// Judge an export of an airgap usage log with public keys alone, in Go.
//
//	verify_export EXPORT --vkey FILE [--export-key FILE] [--anchors PATH]... [--memory DIR] [--json]
//
// Signatures of notes, leaf and node hashes, inclusion and consistency proofs are those of the Go
// checksum database (golang.org/x/mod/sumdb). With Debian's golang-go and golang-golang-x-mod-dev,
// and no network:
//
//	GO111MODULE=off GOPATH=/usr/share/gocode go build -o verify_export verify_export.go
//
// Exit 0 good, 1 tampered, 2 usage, 3 cannot tell. Both signatures of a manifest are judged; this Go
// has no ML-DSA, so its verification stands below. Not judged here, but by `airgap audit verify`: what
// may stand in a single field of a record (the schema; form, chain and order are judged),
// cosignatures, and derived rows other than JSON lines.
package main

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const (
	segment = 65536
	width   = 256
	maxLine = 16384
	maxNote = 131072
)

type tampered struct{ text string }

func bad(check, place, format string, args ...interface{}) {
	panic(tampered{check + ", " + place + ": " + fmt.Sprintf(format, args...)})
}

type result struct {
	Verdict  string   `json:"verdict"`
	Code     string   `json:"code"`
	Exit     int      `json:"exit"`
	Origin   string   `json:"origin"`
	Number   int64    `json:"number"`
	First    int64    `json:"first"`
	Size     int64    `json:"size"`
	Root     string   `json:"root"`
	Anchored int64    `json:"anchored_size"`
	Anchors  int      `json:"anchors"`
	Stored   bool     `json:"remembered"`
	Unknown  []string `json:"unknown"`
	Notes    []string `json:"notes"`
	Tampered []string `json:"tampered"`
}

func (r *result) unknown(format string, args ...interface{}) {
	r.Unknown = append(r.Unknown, fmt.Sprintf(format, args...))
}

// -- files -----------------------------------------------------------------------------------

type entry struct {
	Path   string `json:"path"`
	Bytes  int64  `json:"bytes"`
	Sha256 string `json:"sha256"`
	Sha384 string `json:"sha384"`
}

type manifest struct {
	Format, Origin, Root, Rows string
	Number, First, Size        int64
	RowsFile                   string `json:"rows_file"`
	Payloads                   bool
	Files                      []entry
	Since                      *struct {
		Size int64
		Root string
	}
}

func read(path string, limit int64) ([]byte, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		bad("files", path, "not a plain file of at most %d bytes", limit)
	}
	return os.ReadFile(path)
}

func checkSignatures(folder string, content, key []byte, r *result) {
	if key == nil {
		r.Notes = append(r.Notes, "manifest: its signatures were not checked: no export key was given")
		return
	}
	place := "manifest.sig"
	raw, err := read(filepath.Join(folder, place), 32768)
	if err != nil {
		bad("manifest signature", place, "nothing")
	}
	var document struct {
		Format, Key string
		Signatures  map[string]string
	}
	id := sha256.Sum256(key)
	if decode(raw, &document, "format key signatures") != nil || document.Format != "airgap-audit-signatures/1" || document.Key != hex.EncodeToString(id[:]) {
		bad("manifest signature", place, "malformed, or of another key")
	}
	signed := append([]byte("airgap-audit-export/1\n"), content...)
	found := map[string][]byte{}
	for scheme, length := range map[string]int{"ed25519": 64, "ml-dsa-87": dsaSig} {
		said := document.Signatures[scheme]
		signature, err := base64.StdEncoding.DecodeString(said)
		if err != nil || base64.StdEncoding.EncodeToString(signature) != said || len(signature) != length || len(document.Signatures) != 2 {
			bad("manifest signature", place, "both signatures are required")
		}
		found[scheme] = signature
	}
	classic, lattice := exportKeys(key)
	if !ed25519.Verify(classic, signed, found["ed25519"]) {
		bad("manifest signature", place, "the ed25519 signature does not hold")
	}
	if !verifyMLDSA87(lattice, signed, nil, found["ml-dsa-87"]) {
		bad("manifest signature", place, "the ml-dsa-87 signature does not hold")
	}
}

var dsaName = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 3, 19} // id-ml-dsa-87, RFC 9881

// exportKeys returns the two keys of a file that came from the reader, not from the export.
func exportKeys(content []byte) (classic ed25519.PublicKey, lattice []byte) {
	for {
		var block *pem.Block
		if block, content = pem.Decode(content); block == nil {
			break
		}
		var found struct {
			Algorithm pkix.AlgorithmIdentifier
			Key       asn1.BitString
		}
		if rest, err := asn1.Unmarshal(block.Bytes, &found); err != nil || len(rest) > 0 {
			continue
		}
		if found.Algorithm.Algorithm.Equal(dsaName) && len(found.Key.Bytes) == dsaKey {
			lattice = found.Key.Bytes
		} else if public, err := x509.ParsePKIXPublicKey(block.Bytes); err == nil {
			classic, _ = public.(ed25519.PublicKey)
		}
	}
	if classic == nil || lattice == nil {
		panic(errors.New("the export key file does not hold an ed25519 and an ml-dsa-87 key"))
	}
	return classic, lattice
}

var pathForm = regexp.MustCompile(`^[A-Za-z0-9_./-]{1,200}$`)
var keyForm = regexp.MustCompile(`^[a-z0-9_-]+$`)

// decode takes one JSON object and nothing after it. The decoder of Go would read keys in any case,
// keys twice, and null for anything: so the named fields must be there, each once, as it is spelled.
func decode(content []byte, into interface{}, fields string) error {
	tokens := json.NewDecoder(bytes.NewReader(content))
	names, err := members(tokens, false)
	if err != nil {
		return err
	}
	if _, end := tokens.Token(); end != io.EOF {
		return errors.New("something follows the document")
	}
	if strings.Join(names, " ") != fields {
		return errors.New("a field is missing, or there is another")
	}
	decoder := json.NewDecoder(bytes.NewReader(content))
	decoder.DisallowUnknownFields()
	return decoder.Decode(into)
}

// members reads one value and returns its keys in order, if it is an object.
func members(tokens *json.Decoder, nullable bool) (names []string, err error) {
	token, err := tokens.Token()
	if err != nil || (token == nil && !nullable) {
		return nil, fmt.Errorf("null, or no value (%v)", err)
	}
	if token != json.Delim('{') && token != json.Delim('[') {
		return nil, nil
	}
	seen := map[string]bool{}
	for tokens.More() {
		name := ""
		if token == json.Delim('{') {
			key, err := tokens.Token()
			name, _ = key.(string)
			if err != nil || seen[name] || !keyForm.MatchString(name) {
				return nil, fmt.Errorf("key %q comes twice, or is none", name)
			}
			seen[name], names = true, append(names, name)
		}
		if _, err := members(tokens, name == "since"); err != nil {
			return nil, err
		}
	}
	sort.Strings(names)
	_, err = tokens.Token()
	return names, err
}

func parseManifest(content []byte) manifest {
	var m manifest
	err := decode(content, &m, "files first format number origin payloads root rows rows_file since size")
	if err != nil || m.Format != "airgap-audit-export/1" || m.First%segment != 0 || m.First < 0 || m.Number < 1 || m.Size < 1 ||
		!strings.Contains(" jsonl csv ocsf rfc5424 cef hec ", " "+m.Rows+" ") || m.RowsFile != "records."+m.Rows || utf8.RuneCountInString(m.Origin) > 200 {
		bad("manifest", "manifest.json", "malformed %v", err)
	}
	seen := map[string]bool{}
	for _, f := range m.Files {
		if seen[f.Path] || !pathForm.MatchString(f.Path) || filepath.Clean(f.Path) != f.Path || strings.HasPrefix(f.Path, "/") || strings.HasPrefix(f.Path, "..") {
			bad("manifest", "manifest.json", "path %q", f.Path)
		}
		seen[f.Path] = true
	}
	return m
}

func checkFiles(folder string, m manifest) {
	listed := map[string]entry{}
	for _, f := range m.Files {
		listed[f.Path] = f
	}
	err := filepath.WalkDir(folder, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, _ := filepath.Rel(folder, path)
		if !d.Type().IsRegular() {
			bad("manifest", name, "a link or special file")
		}
		if name == "manifest.json" || name == "manifest.sig" {
			return nil
		}
		want, ok := listed[name]
		if !ok {
			bad("manifest", name, "not listed")
		}
		delete(listed, name)
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		defer file.Close()
		one, two := sha256.New(), sha512.New384()
		size, err := io.Copy(io.MultiWriter(one, two), file)
		if err == nil && (size != want.Bytes || hex.EncodeToString(one.Sum(nil)) != want.Sha256 || hex.EncodeToString(two.Sum(nil)) != want.Sha384) {
			bad("manifest", name, "other content than its digests say")
		}
		return err
	})
	if err != nil {
		panic(err)
	}
	for name := range listed {
		bad("manifest", name, "listed and not there")
	}
}

// -- ML-DSA-87, verification alone (FIPS 204; SHAKE of FIPS 202), which Go 1.19 does not have ----

const (
	dsaQ, dsaGamma1, dsaGamma2 = 8380417, 1 << 19, (8380417 - 1) / 32
	dsaK, dsaL, dsaTau         = 8, 7, 60
	dsaBeta, dsaOmega          = 120, 75
	dsaKey, dsaSig             = 32 + 320*dsaK, 64 + 640*dsaL + dsaOmega + dsaK
)

type poly [256]int64

var dsaZetas = func() (z poly) { // 1753 is a primitive 512th root of unity modulo q
	for i := range z {
		z[i] = 1
		for n := 0; n < int(bits.Reverse8(uint8(i))); n++ {
			z[i] = z[i] * 1753 % dsaQ
		}
	}
	return z
}()

func (p *poly) ntt() {
	m := 0
	for size := 128; size >= 1; size /= 2 {
		for start := 0; start < 256; start += 2 * size {
			m++
			for j := start; j < start+size; j++ {
				t := dsaZetas[m] * p[j+size] % dsaQ
				p[j+size], p[j] = (p[j]-t+dsaQ)%dsaQ, (p[j]+t)%dsaQ
			}
		}
	}
}

func (p *poly) inverse() {
	m := 256
	for size := 1; size < 256; size *= 2 {
		for start := 0; start < 256; start += 2 * size {
			m--
			for j := start; j < start+size; j++ {
				a, b := p[j], p[j+size]
				p[j], p[j+size] = (a+b)%dsaQ, (dsaQ-dsaZetas[m])*(a-b+dsaQ)%dsaQ
			}
		}
	}
	for j := range p {
		p[j] = p[j] * 8347681 % dsaQ // the inverse of 256
	}
}

// unpack reads 256 numbers of so many bits, the lowest bit first.
func unpack(content []byte, width int) (p poly) {
	for i := range p {
		for bit := 0; bit < width; bit++ {
			at := i*width + bit
			p[i] |= int64(content[at/8]>>(at%8)&1) << bit
		}
	}
	return p
}

// hints are places in order, polynomial by polynomial; there is one spelling of them.
func hints(content []byte) (h [dsaK][256]bool, ok bool) {
	index := 0
	for i := 0; i < dsaK; i++ {
		end, first := int(content[dsaOmega+i]), index
		if end < index || end > dsaOmega {
			return h, false
		}
		for ; index < end; index++ {
			if index > first && content[index-1] >= content[index] {
				return h, false
			}
			h[i][content[index]] = true
		}
	}
	for ; index < dsaOmega; index++ {
		if content[index] != 0 {
			return h, false
		}
	}
	return h, true
}

func challenge(seed []byte) (c poly) {
	stream := newShake(136, seed)
	signs := stream.read(8)
	for i := 256 - dsaTau; i < 256; i++ {
		j := int(stream.read(1)[0])
		for j > i {
			j = int(stream.read(1)[0])
		}
		at := i + dsaTau - 256
		c[i], c[j] = c[j], 1
		if signs[at/8]>>(at%8)&1 == 1 {
			c[j] = dsaQ - 1
		}
	}
	return c
}

func matrixEntry(rho []byte, row, column int) (p poly) {
	stream := newShake(168, rho, []byte{byte(column), byte(row)})
	for i := 0; i < 256; {
		b := stream.read(3)
		if v := int64(b[0]) | int64(b[1])<<8 | int64(b[2]&127)<<16; v < dsaQ {
			p[i] = v
			i++
		}
	}
	return p
}

func useHint(hint bool, r int64) int64 {
	low := r % (2 * dsaGamma2)
	if low > dsaGamma2 {
		low -= 2 * dsaGamma2
	}
	high := (r - low) / (2 * dsaGamma2)
	if r-low == dsaQ-1 {
		high, low = 0, low-1
	}
	if hint && low > 0 {
		return (high + 1) % 16
	} else if hint {
		return (high + 15) % 16
	}
	return high
}

// verifyMLDSA87 says whether this is the signature of the message, with this context.
func verifyMLDSA87(key, message, context, signature []byte) bool {
	if len(key) != dsaKey || len(signature) != dsaSig || len(context) > 255 {
		return false
	}
	h, ok := hints(signature[64+640*dsaL:])
	if !ok {
		return false
	}
	var z [dsaL]poly
	for s := range z {
		z[s] = unpack(signature[64+640*s:], 20)
		for i, v := range z[s] {
			v = dsaGamma1 - v
			if v >= dsaGamma1-dsaBeta || -v >= dsaGamma1-dsaBeta {
				return false
			}
			z[s][i] = (v + dsaQ) % dsaQ
		}
		z[s].ntt()
	}
	c := challenge(signature[:64])
	c.ntt()
	tr := newShake(136, key).read(64)
	mu := newShake(136, tr, []byte{0, byte(len(context))}, context, message).read(64)
	var encoded []byte
	for r := 0; r < dsaK; r++ {
		t, w := unpack(key[32+320*r:], 10), poly{}
		for i := range t {
			t[i] = t[i] << 13 % dsaQ
		}
		t.ntt()
		for s := range z {
			a := matrixEntry(key[:32], r, s)
			for i := range w {
				w[i] = (w[i] + a[i]*z[s][i]) % dsaQ
			}
		}
		for i := range w {
			w[i] = (w[i] - c[i]*t[i]%dsaQ + dsaQ) % dsaQ
		}
		w.inverse()
		for i := 0; i < 256; i += 2 {
			encoded = append(encoded, byte(useHint(h[r][i], w[i])|useHint(h[r][i+1], w[i+1])<<4))
		}
	}
	return bytes.Equal(signature[:64], newShake(136, mu, encoded).read(64))
}

type shake struct {
	state    [25]uint64
	rate, at int
}

// newShake absorbs; the rate in bytes is 168 for SHAKE128 and 136 for SHAKE256.
func newShake(rate int, parts ...[]byte) *shake {
	s := &shake{rate: rate}
	for _, part := range parts {
		for _, b := range part {
			s.mix(s.at, b)
			if s.at++; s.at == rate {
				s.permute()
				s.at = 0
			}
		}
	}
	s.mix(s.at, 0x1f)
	s.mix(rate-1, 0x80)
	s.permute()
	s.at = 0
	return s
}

func (s *shake) mix(at int, b byte) { s.state[at/8] ^= uint64(b) << (at % 8 * 8) }

func (s *shake) read(count int) []byte {
	found := make([]byte, count)
	for i := range found {
		if s.at == s.rate {
			s.permute()
			s.at = 0
		}
		found[i] = byte(s.state[s.at/8] >> (s.at % 8 * 8))
		s.at++
	}
	return found
}

// permute is Keccak-f[1600]; the round constants come from the LFSR of FIPS 202, 3.2.5.
func (s *shake) permute() {
	a, register := &s.state, byte(1)
	for round := 0; round < 24; round++ {
		var c [5]uint64
		for x := range c {
			c[x] = a[x] ^ a[x+5] ^ a[x+10] ^ a[x+15] ^ a[x+20]
		}
		for i := range a {
			a[i] ^= c[(i+4)%5] ^ bits.RotateLeft64(c[(i+1)%5], 1)
		}
		x, y, moved := 1, 0, a[1]
		for t := 1; t <= 24; t++ {
			x, y = y, (2*x+3*y)%5
			moved, a[x+5*y] = a[x+5*y], bits.RotateLeft64(moved, t*(t+1)/2)
		}
		for y := 0; y < 25; y += 5 {
			row := [5]uint64{a[y], a[y+1], a[y+2], a[y+3], a[y+4]}
			for x := range row {
				a[y+x] = row[x] ^ (^row[(x+1)%5] & row[(x+2)%5])
			}
		}
		for j := 0; j < 7; j++ {
			if register&1 == 1 {
				a[0] ^= 1 << (1<<j - 1)
			}
			if register>>7 == 1 {
				register = register<<1 ^ 0x71
			} else {
				register <<= 1
			}
		}
	}
}

// -- heads and keys --------------------------------------------------------------------------

type head struct {
	origin string
	size   int64
	root   tlog.Hash
	raw    []byte
	first  uint32 // key id of the first signature
	by     string // its name
}

func parseHead(raw []byte) (head, error) {
	h := head{raw: raw}
	parsed, err := note.Open(raw, note.VerifierList())
	unverified, ok := err.(*note.UnverifiedNoteError)
	if !ok {
		return h, fmt.Errorf("not a signed note: %v", err)
	}
	parsed = unverified.Note
	lines := strings.Split(parsed.Text, "\n")
	if len(lines) != 4 || lines[0] == "" || len(raw) > maxNote {
		return h, errors.New("expected origin, size and root")
	}
	h.origin, h.first, h.by = lines[0], parsed.UnverifiedSigs[0].Hash, parsed.UnverifiedSigs[0].Name
	h.size, err = strconv.ParseInt(lines[1], 10, 64)
	if err != nil || strconv.FormatInt(h.size, 10) != lines[1] || h.size < 0 {
		return h, errors.New("a size that is none")
	}
	h.root, err = tlog.ParseHash(lines[2])
	return h, err
}

type epoch struct {
	start int64 // heads above it are signed by this key
	vkey  string
	key   note.Verifier // nil where nobody knows it
}

type epochs []epoch

func align(ring []string, rotations []epoch) epochs {
	begin := 0
	for i, r := range rotations {
		if r.vkey == ring[0] {
			begin = i + 1
		}
	}
	for i, vkey := range ring[1:] {
		if begin+i >= len(rotations) || rotations[begin+i].vkey != vkey {
			bad("key epoch", "log/seg", "no epoch of the trusted key %.80s", vkey)
		}
	}
	chain := epochs{{0, "", nil}}
	if begin == 0 {
		chain[0] = epoch{0, ring[0], verifier(ring[0])}
	}
	return append(chain, rotations...)
}

func verifier(vkey string) note.Verifier {
	v, err := note.NewVerifier(vkey)
	if err != nil {
		bad("key epoch", "vkey", "%v", err)
	}
	return v
}

func (e epochs) holder(size int64) note.Verifier {
	found := e[0].key
	for _, each := range e {
		if each.start < size {
			found = each.key
		}
	}
	return found
}

func (e epochs) signers(h head) (map[uint32]bool, error) {
	var known []note.Verifier
	for _, each := range e {
		if each.key != nil {
			known = append(known, each.key)
		}
	}
	opened, err := note.Open(h.raw, note.VerifierList(known...))
	if err != nil {
		return nil, err
	}
	found := map[uint32]bool{}
	for _, sig := range opened.Sigs {
		found[sig.Hash] = true
	}
	return found, nil
}

func (e epochs) require(h head, place string) map[uint32]bool {
	signers, err := e.signers(h)
	if err != nil {
		bad("signature", place, "%v", err)
	}
	if holder := e.holder(h.size); holder != nil && !signers[holder.KeyHash()] {
		bad("key epoch", place, "size %d is the affair of key %08x", h.size, holder.KeyHash())
	}
	return signers
}

// -- records ---------------------------------------------------------------------------------

var wholeForm = regexp.MustCompile(`^(0|-?[1-9][0-9]{0,15})$`)

func allowed(value interface{}) bool {
	switch v := value.(type) {
	case json.Number:
		n, err := v.Int64()
		return wholeForm.MatchString(v.String()) && err == nil && n < 1<<53 && n > -(1<<53)
	case map[string]interface{}:
		for _, each := range v {
			if !allowed(each) {
				return false
			}
		}
	case []interface{}:
		for _, each := range v {
			if !allowed(each) {
				return false
			}
		}
	}
	return true
}

// parseRecord takes the one canonical form: writing the object again shows keys twice, and order.
func parseRecord(line []byte) (map[string]interface{}, error) {
	for i := 0; i < len(line); i++ {
		if line[i] < 0x20 || line[i] > 0x7e {
			return nil, errors.New("not printable ASCII")
		}
		if line[i] == '\\' {
			if i++; i == len(line) || line[i] != '"' && line[i] != '\\' {
				return nil, errors.New("an escape of another character than a quote or a backslash")
			}
		}
	}
	var record map[string]interface{}
	decoder := json.NewDecoder(bytes.NewReader(line))
	decoder.UseNumber()
	if err := decoder.Decode(&record); err != nil || len(line) > maxLine {
		return nil, fmt.Errorf("not a record: %v", err)
	}
	var again bytes.Buffer
	encoder := json.NewEncoder(&again)
	encoder.SetEscapeHTML(false)
	if encoder.Encode(record) != nil || !bytes.Equal(bytes.TrimSuffix(again.Bytes(), []byte("\n")), line) || !allowed(record) {
		return nil, errors.New("not in canonical form")
	}
	for _, name := range strings.Fields("v seq prev ts mono_ns boot host inst kind phase") {
		if record[name] == nil {
			return nil, errors.New("a field is missing: " + name)
		}
	}
	for _, name := range strings.Fields("actor decision in out tok err data") {
		_, inner := record[name].(map[string]interface{})
		if _, there := record[name]; there && !inner {
			return nil, errors.New("no object: " + name)
		}
	}
	if _, decided := record["decision"]; record["v"] != json.Number("1") || decided && text(record, "decision", "id") == "" {
		return nil, errors.New("a record of another version, or a decision without its record")
	}
	return record, nil
}

func text(record map[string]interface{}, path ...string) string {
	var value interface{} = record
	for _, name := range path {
		inner, _ := value.(map[string]interface{})
		value = inner[name]
	}
	found, _ := value.(string)
	return found
}

func number(record map[string]interface{}) int64 {
	return whole(record["seq"])
}

func tileName(index int64, count int) string {
	name := fmt.Sprintf("%03d", index%1000)
	for index >= 1000 {
		index /= 1000
		name = fmt.Sprintf("x%03d/%s", index%1000, name)
	}
	if count < width {
		name += ".p/" + strconv.Itoa(count)
	}
	return name
}

type pass struct {
	m             manifest
	log           string
	size          int64
	peaks         []tlog.Hash
	rows          [][]tlog.Hash // the tile that grows at each level
	wanted        map[int64]bool
	roots, leaves map[int64]tlog.Hash
	rotations     []epoch
	closing       map[int64]head
	signers       map[[2]int64]int64
	open          map[string]string
	parts         map[string]part // by request: its newest chunk
	cited, sealed map[string]bool
	purged        map[string]bool
	prev          string
	bundle        []byte
	bundled       int
	seen          map[string]bool
	journal       *bufio.Reader
	next          *head
	last          *head
	derived       *bufio.Reader
	previous      *previous
	notes         []string
}

func (p *pass) root() tlog.Hash {
	found := p.peaks[len(p.peaks)-1]
	for i := len(p.peaks) - 2; i >= 0; i-- {
		found = tlog.NodeHash(p.peaks[i], found)
	}
	return found
}

func (p *pass) compare(name string, want []byte, check string) {
	found, err := read(filepath.Join(p.log, "tile", name), maxLine*width*2)
	if err != nil || !bytes.Equal(found, want) {
		bad(check, "log/tile/"+name, "other content than the records have")
	}
	p.seen[name] = true
}

func (p *pass) tile(level int, value tlog.Hash) {
	if level == len(p.rows) {
		p.rows = append(p.rows, nil)
	}
	p.rows[level] = append(p.rows[level], value)
	row := p.rows[level]
	if len(row) < width {
		return
	}
	p.compareRow(level, (p.size-1)/pow(level+1), row)
	for len(row) > 1 {
		var up []tlog.Hash
		for i := 0; i < len(row); i += 2 {
			up = append(up, tlog.NodeHash(row[i], row[i+1]))
		}
		row = up
	}
	p.rows[level] = nil
	p.tile(level+1, row[0])
}

func pow(level int) int64 {
	found := int64(1)
	for ; level > 0; level-- {
		found *= width
	}
	return found
}

func (p *pass) compareRow(level int, index int64, row []tlog.Hash) {
	var content []byte
	for _, h := range row {
		content = append(content, h[:]...)
	}
	p.compare(fmt.Sprintf("%d/%s", level, tileName(index, len(row))), content, "tile")
}

func (p *pass) grow(leaf tlog.Hash) {
	seq, top := p.size, leaf
	for count := p.size; count&1 == 1; count >>= 1 {
		top = tlog.NodeHash(p.peaks[len(p.peaks)-1], top)
		p.peaks = p.peaks[:len(p.peaks)-1]
	}
	p.peaks = append(p.peaks, top)
	p.size++
	p.tile(0, leaf)
	p.prev = hex.EncodeToString(leaf[:])
	if p.wanted[seq] {
		p.leaves[seq] = leaf
	}
	if p.wanted[p.size] || p.size == p.m.Size {
		p.roots[p.size] = p.root()
	}
	for p.next != nil && p.next.size <= p.size {
		h := *p.next
		if h.size != p.size || h.origin != p.m.Origin || h.by != p.m.Origin || h.root != p.root() {
			bad("head journal", "log/checkpoints.jsonl", "another root at size %d", h.size)
		}
		epoch, closes := int64(len(p.rotations)), len(p.rotations) > 0 && p.rotations[len(p.rotations)-1].start == h.size
		if closes {
			epoch--
			p.closing[h.size] = h
		}
		if _, ok := p.signers[[2]int64{epoch, int64(h.first)}]; !ok {
			p.signers[[2]int64{epoch, int64(h.first)}] = h.size
		}
		p.last = &h
		p.next = p.nextHead()
	}
}

// A line of the journal in its one spelling; canonical base64 has no other last characters.
var journalForm = regexp.MustCompile(`^\{"note": "[^" ]+\\n[0-9]{1,16}\\n[A-Za-z0-9+/]{43}=\\n\\n` +
	`(?:\\u2014 [^" ]+ (?:[A-Za-z0-9+/]{4})+(?:[A-Za-z0-9+/][AQgw]==|[A-Za-z0-9+/]{2}[AEIMQUYcgkosw048]=)?\\n){1,24}"\}\n$`)

func (p *pass) nextHead() *head {
	line, err := p.journal.ReadBytes('\n')
	if err == io.EOF && len(line) == 0 {
		return nil
	}
	var entry struct{ Note string }
	decoder := json.NewDecoder(bytes.NewReader(line))
	decoder.DisallowUnknownFields()
	if err != nil || !journalForm.Match(line) || decoder.Decode(&entry) != nil {
		bad("head journal", "log/checkpoints.jsonl", "a line that is none")
	}
	h, err := parseHead([]byte(entry.Note))
	if err != nil {
		bad("head journal", "log/checkpoints.jsonl", "%v", err)
	}
	return &h
}

func (p *pass) obey(record map[string]interface{}) {
	kind, phase := text(record, "kind"), text(record, "phase")
	if kind == "key.rotate" && text(record, "data", "use") == "log" {
		vkey := text(record, "data", "next")
		if key := verifier(vkey); key.Name() != p.m.Origin {
			bad("key epoch", "log/seg", "a key of another log")
		} else {
			p.rotations = append(p.rotations, epoch{number(record) + 1, vkey, key})
		}
	}
	if said := text(record, "data", "previous"); kind == "boot" && number(record) == 0 && said != "" {
		p.previous = parsePrevious(said)
		p.notes = append(p.notes, fmt.Sprintf("log before: begun by %s and %s in place of %s",
			text(record, "data", "person_1"), text(record, "data", "person_2"), said))
	}
	if kind == "spill.purge" && phase == "intent" {
		p.purged[text(record, "data", "payload")] = true
	}
	for _, path := range [][]string{{"decision", "id"}, {"data", "evidence"}, {"data", "screen"}, {"data", "settings"}} {
		if digest := text(record, path...); digest != "" {
			p.cited[digest] = true
		}
	}
	for _, side := range []string{"in", "out"} {
		if digest := text(record, side, "sealed"); digest != "" {
			p.sealed[digest] = true
		}
	}
}

func (p *pass) pair(record map[string]interface{}, place string) {
	kind, phase, req := text(record, "kind"), text(record, "phase"), text(record, "req")
	if phase == "event" {
		return
	}
	known, ok := p.open[req]
	if phase == "intent" {
		if ok {
			bad("pairing", place, "record %d: a second intent", p.size)
		}
		p.open[req] = kind
	} else if (!ok && p.m.First == 0) || (ok && known != kind) {
		bad("pairing", place, "record %d: %s %s without its intent", p.size, kind, phase)
	}
	p.chunk(record, ok || p.m.First == 0, place)
	if phase == "outcome" {
		delete(p.open, req)
	}
}

type part struct {
	number, bytes int64
	commit        string
}

// chunk: chunks are numbered and grow; the outcome commits to what the last of them did.
func (p *pass) chunk(record map[string]interface{}, judged bool, place string) {
	req := text(record, "req")
	before, ok := p.parts[req]
	out, said := record["out"].(map[string]interface{})
	now := part{whole(record["part"]), whole(out["bytes"]), text(record, "out", "commit")}
	switch text(record, "phase") {
	case "chunk":
		due, least := int64(0), int64(0)
		if ok {
			due, least = before.number+1, before.bytes
		}
		if (judged || ok) && (now.number != due || now.bytes <= least) {
			bad("chunks", place, "record %d: chunk %d was due", p.size, due)
		}
		p.parts[req] = now
	case "outcome":
		delete(p.parts, req)
		if ok && said && (now.bytes != before.bytes || now.commit != before.commit) {
			bad("chunks", place, "record %d: another output than that of its chunks", p.size)
		}
	}
}

func whole(value interface{}) int64 {
	n, _ := value.(json.Number)
	found, err := n.Int64()
	if err != nil {
		return -1
	}
	return found
}

func (p *pass) line(raw []byte, place string) {
	line := bytes.TrimSuffix(raw, []byte("\n"))
	record, err := parseRecord(line)
	if err != nil || len(line) == len(raw) {
		bad("record", place, "record %d: %v", p.size, err)
	}
	if number(record) != p.size {
		bad("sequence", place, "record %d says %d", p.size, number(record))
	}
	if text(record, "prev") != p.prev {
		bad("chain", place, "record %d does not follow the one before", p.size)
	}
	p.obey(record)
	p.pair(record, place)
	leaf := tlog.RecordHash(line)
	p.bundle = append(p.bundle, byte(len(line)>>8), byte(len(line)))
	p.bundle = append(p.bundle, line...)
	p.bundled++
	if p.derived != nil {
		want := fmt.Sprintf(`{"leaf":"%x","origin":"%s","record":%s,"seq":%d}`+"\n", leaf[:], p.m.Origin, line, p.size)
		found := make([]byte, len(want))
		if _, err := io.ReadFull(p.derived, found); err != nil || string(found) != want {
			bad("rows", p.m.RowsFile, "record %d has another row", p.size)
		}
	}
	p.grow(leaf)
	if p.size%width == 0 {
		p.flush()
	}
}

func (p *pass) flush() {
	if p.bundled > 0 {
		p.compare("entries/"+tileName((p.size-1)/width, p.bundled), p.bundle, "entry bundle")
		p.bundle, p.bundled = nil, 0
	}
}

func (p *pass) kept() map[int64][]byte {
	found := map[int64][]byte{}
	content, _ := os.ReadFile(filepath.Join(p.log, "kept.jsonl"))
	for _, line := range bytes.Split(content, []byte("\n")) {
		if len(line) > 0 {
			record, err := parseRecord(line)
			if err != nil {
				bad("record", "log/kept.jsonl", "%v", err)
			}
			found[number(record)] = line
		}
	}
	return found
}

func (p *pass) run() {
	kept := p.kept()
	for index := int64(0); index < p.m.First/width; index++ {
		name := "0/" + tileName(index, width)
		tile, err := read(filepath.Join(p.log, "tile", name), 32*width)
		if err != nil || len(tile) != 32*width {
			bad("tile", "log/tile/"+name, "not whole")
		}
		for at := 0; at < len(tile); at += 32 {
			var leaf tlog.Hash
			copy(leaf[:], tile[at:])
			if line, ok := kept[p.size]; ok {
				if tlog.RecordHash(line) != leaf {
					bad("record", "log/kept.jsonl", "record %d is another one", p.size)
				}
				record, _ := parseRecord(line)
				p.obey(record)
			}
			p.grow(leaf)
		}
	}
	names, err := os.ReadDir(filepath.Join(p.log, "seg"))
	if err != nil {
		panic(err)
	}
	for i, each := range names {
		place := "log/seg/" + each.Name()
		if each.Name() != fmt.Sprintf("%08d.jsonl", p.m.First/segment+int64(i)) || (i > 0 && p.size%segment != 0) {
			bad("segment", place, "a segment is missing, not whole, or has another name")
		}
		file, err := os.Open(filepath.Join(p.log, "seg", each.Name()))
		if err != nil {
			panic(err)
		}
		reader := bufio.NewReaderSize(file, maxLine+2)
		for {
			raw, err := reader.ReadSlice('\n')
			if len(raw) > 0 {
				p.line(raw, place)
			}
			if err == io.EOF {
				break
			} else if err != nil {
				bad("record", place, "record %d: %v", p.size, err)
			}
		}
		file.Close()
	}
	p.finish()
}

func (p *pass) finish() {
	p.flush()
	for level, row := range p.rows {
		if len(row) > 0 {
			p.compareRow(level, p.size/pow(level+1), row)
		}
	}
	base := filepath.Join(p.log, "tile")
	filepath.WalkDir(base, func(path string, d fs.DirEntry, err error) error {
		name, _ := filepath.Rel(base, path)
		if err == nil && !d.IsDir() && !p.seen[name] {
			bad("tile", "log/tile/"+name, "of records that are not there")
		}
		return err
	})
	if p.next != nil {
		bad("head journal", "log/checkpoints.jsonl", "a head of size %d", p.next.size)
	}
	if p.derived != nil {
		if _, err := p.derived.ReadByte(); err != io.EOF {
			bad("rows", p.m.RowsFile, "more rows than records")
		}
	}
	for kind, digests := range map[string]map[string]bool{"objects": p.cited, "sealed": p.sealed} {
		for digest := range digests {
			if len(digest) != 71 {
				bad(kind, digest, "not a digest")
			}
			name := digest[7:]
			place := filepath.Join("log", kind, name[:2], name)
			content, err := read(filepath.Join(p.log, kind, name[:2], name), 1<<30)
			if err != nil && kind == "sealed" && (p.purged[digest] || !p.m.Payloads) {
				continue
			}
			if sum := sha256.Sum256(content); err != nil || hex.EncodeToString(sum[:]) != name {
				bad(kind, place, "not what the record cites")
			}
		}
	}
}

// -- anchors and memory ----------------------------------------------------------------------

type anchor struct {
	name  string
	head  head
	note  bool
	index int64 // -1 without a receipt
	leaf  tlog.Hash
	proof []tlog.Hash
}

var shortForm = regexp.MustCompile(`^([!-*,-~]{1,200}) (0|[1-9][0-9]{0,15}) ([A-Za-z0-9+/]{43}=)\s*$`)

func parseHashes(lines []string) ([]tlog.Hash, error) {
	var found []tlog.Hash
	for _, line := range lines {
		h, err := tlog.ParseHash(line)
		if err != nil {
			return nil, err
		}
		found = append(found, h)
	}
	return found, nil
}

func parseAnchor(content []byte, name string) (a anchor, err error) {
	a = anchor{name: name, index: -1, note: true}
	if m := shortForm.FindSubmatch(content); m != nil {
		a.note, a.head.origin = false, string(m[1])
		a.head.size, _ = strconv.ParseInt(string(m[2]), 10, 64)
		a.head.root, err = tlog.ParseHash(string(m[3]))
		return a, err
	}
	if bytes.HasPrefix(content, []byte("c2sp.org/tlog-proof@v1\n")) {
		cut := bytes.Index(content, []byte("\n\n"))
		if cut < 0 {
			return a, errors.New("a receipt without a checkpoint")
		}
		lines := strings.Split(string(content[:cut]), "\n")
		if len(lines) < 3 || !strings.HasPrefix(lines[1], "extra ") || !strings.HasPrefix(lines[2], "index ") {
			return a, errors.New("a receipt without leaf hash or index")
		}
		if a.leaf, err = tlog.ParseHash(lines[1][6:]); err != nil {
			return a, err
		}
		if a.index, err = strconv.ParseInt(lines[2][6:], 10, 64); err != nil {
			return a, err
		}
		if a.proof, err = parseHashes(lines[3:]); err != nil {
			return a, err
		}
		content = content[cut+2:]
	}
	a.head, err = parseHead(content)
	return a, err
}

// previous is what a log says of the one before: `origin size root`, or an origin without a head.
type previous struct {
	origin string
	size   int64
	root   tlog.Hash
}

func parsePrevious(said string) *previous {
	found, parts := previous{origin: said}, strings.Split(said, " ")
	if len(parts) == 3 {
		size, err := strconv.ParseInt(parts[1], 10, 64)
		root, err2 := tlog.ParseHash(parts[2])
		if err != nil || err2 != nil || size < 0 {
			bad("log before", "record 0", "%.80q", said)
		}
		found = previous{parts[0], size, root}
	} else if len(parts) != 1 {
		bad("log before", "record 0", "%.80q", said)
	}
	return &found
}

// earlier holds a head of the log before against what this one says of it.
func (a anchor) earlier(p *pass, r *result) {
	place := "anchor " + a.name
	if a.head.size > p.previous.size {
		r.unknown("lost records: %s covers %d records of the log before, which is said to end at %d", place, a.head.size, p.previous.size)
	} else if a.head.size == p.previous.size && a.head.root != p.previous.root {
		bad("root", place, "another root of the log before at size %d", a.head.size)
	} else {
		p.notes = append(p.notes, "log before: "+place+" is judged with that log")
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func (a anchor) agrees(p *pass, e epochs, r *result) bool {
	place := "anchor " + a.name
	if p.previous != nil && a.head.origin == p.previous.origin && p.previous.origin != p.m.Origin {
		a.earlier(p, r)
		return false
	}
	if a.head.origin != p.m.Origin {
		r.unknown("%s: of another log", place)
		return false
	}
	if a.note {
		if _, err := e.signers(a.head); err != nil {
			r.unknown("%s: %v", place, err)
			return false
		}
		e.require(a.head, place)
	}
	if a.index >= 0 && (a.index >= a.head.size || tlog.CheckRecord(a.proof, a.head.size, a.head.root, a.index, a.leaf) != nil) {
		r.unknown("%s: its inclusion proof does not hold", place)
		return false
	}
	if a.head.size > p.size {
		bad("rollback", place, "%d records, %d were there before", p.size, a.head.size)
	}
	if p.roots[a.head.size] != a.head.root {
		bad("root", place, "another root at size %d", a.head.size)
	}
	if a.index >= 0 && p.leaves[a.index] != a.leaf {
		bad("receipt", place, "record %d is another one", a.index)
	}
	return a.head.size > 0
}

func readAnchors(paths []string, r *result) []anchor {
	var found []anchor
	for _, path := range paths {
		files := []string{path}
		if info, err := os.Stat(path); err == nil && info.IsDir() {
			files, _ = filepath.Glob(filepath.Join(path, "*"))
			sort.Strings(files)
		}
		for _, each := range files {
			content, err := os.ReadFile(each)
			if err == nil {
				var a anchor
				if a, err = parseAnchor(content, filepath.Base(each)); err == nil {
					found = append(found, a)
				}
			}
			if err != nil {
				r.unknown("anchor %s: %v", filepath.Base(each), err)
			}
		}
	}
	return found
}

func store(base string, m manifest) error {
	for _, each := range [][2]string{
		{".head", fmt.Sprintf("%s %d %s\n", m.Origin, m.Size, m.Root)}, {".number", fmt.Sprintln(m.Number)},
	} {
		file, err := os.Create(base + each[0] + ".new")
		if err != nil {
			return err
		}
		if _, err = file.WriteString(each[1]); err == nil {
			err = file.Sync()
		}
		if file.Close(); err != nil {
			return err
		}
		if err = os.Rename(base+each[0]+".new", base+each[0]); err != nil {
			return err
		}
	}
	return nil
}

// -- the verdict -----------------------------------------------------------------------------

func checkSince(folder string, m manifest, h head) {
	if m.Since == nil {
		return
	}
	place := "since.tlog-witness"
	content, err := read(filepath.Join(folder, place), 2*maxNote)
	cut := bytes.Index(content, []byte("\n\n"))
	if err != nil || cut < 0 {
		bad("consistency", place, "malformed or missing")
	}
	lines := strings.Split(string(content[:cut]), "\n")
	proof, err := parseHashes(lines[1:])
	request, err2 := parseHead(content[cut+2:])
	old, err3 := tlog.ParseHash(m.Since.Root)
	if err != nil || err2 != nil || err3 != nil || lines[0] != fmt.Sprintf("old %d", m.Since.Size) || request.size != h.size || request.root != h.root ||
		m.Since.Size < 1 || m.Since.Size > h.size || tlog.CheckTree(proof, h.size, h.root, m.Since.Size, old) != nil {
		bad("consistency", place, "the earlier tree is no beginning of this one")
	}
}

func checkHeads(p *pass, e epochs, h head) {
	e.require(h, "log/checkpoint")
	if p.last == nil || p.last.size != h.size {
		bad("head journal", "log/checkpoints.jsonl", "does not end with the checkpoint")
	}
	e.require(*p.last, "log/checkpoints.jsonl")
	for signer, size := range p.signers {
		if holder := e.holder(size); holder != nil && holder.KeyHash() != uint32(signer[1]) {
			bad("key epoch", "log/checkpoints.jsonl", "size %d signed by %08x", size, signer[1])
		}
	}
	for _, r := range p.rotations {
		closing, ok := p.closing[r.start]
		if r.start <= h.size && (!ok || !e.require(closing, "log/checkpoints.jsonl")[r.key.KeyHash()]) {
			bad("key epoch", "log/checkpoints.jsonl", "size %d lacks the next key's signature", r.start)
		}
	}
}

func judge(folder string, ring []string, exportKey []byte, paths []string, memory string, r *result) {
	content, err := read(filepath.Join(folder, "manifest.json"), 1<<26)
	if errors.Is(err, fs.ErrNotExist) {
		bad("manifest", "manifest.json", "nothing: this is no export")
	} else if err != nil {
		panic(err)
	}
	checkSignatures(folder, content, exportKey, r)
	m := parseManifest(content)
	checkFiles(folder, m)
	r.Origin, r.Number, r.First, r.Size = m.Origin, m.Number, m.First, m.Size
	raw, err := read(filepath.Join(folder, "log", "checkpoint"), maxNote)
	h, err2 := parseHead(raw)
	if err != nil || err2 != nil {
		bad("checkpoint", "log/checkpoint", "%v %v", err, err2)
	}
	if root, err := tlog.ParseHash(m.Root); err != nil || m.Origin != h.origin || m.Size != h.size || root != h.root {
		bad("manifest", "manifest.json", "speaks of another head than the checkpoint")
	}
	checkSince(folder, m, h)
	anchors := readAnchors(paths, r)
	sum := sha256.Sum256([]byte(m.Origin))
	base := filepath.Join(memory, hex.EncodeToString(sum[:8]))
	if memory != "" {
		os.MkdirAll(memory, 0o700)
		if last, err := os.ReadFile(base + ".number"); err == nil {
			if n, _ := strconv.ParseInt(strings.TrimSpace(string(last)), 10, 64); n >= m.Number {
				bad("replay", "manifest.json", "export %d after %d", m.Number, n)
			}
		}
		if exists(base + ".head") {
			anchors = append(anchors, readAnchors([]string{base + ".head"}, r)...)
		}
	}
	p := &pass{m: m, log: filepath.Join(folder, "log"), prev: strings.Repeat("0", 64), wanted: map[int64]bool{},
		roots: map[int64]tlog.Hash{}, leaves: map[int64]tlog.Hash{}, closing: map[int64]head{}, signers: map[[2]int64]int64{},
		open: map[string]string{}, parts: map[string]part{}, cited: map[string]bool{}, sealed: map[string]bool{}, purged: map[string]bool{}, seen: map[string]bool{}}
	for _, a := range anchors {
		p.wanted[a.head.size], p.wanted[a.index] = true, true
	}
	journal, err := os.Open(filepath.Join(p.log, "checkpoints.jsonl"))
	if err != nil {
		panic(err)
	}
	p.journal = bufio.NewReader(journal)
	p.next = p.nextHead()
	if m.Rows == "jsonl" {
		file, err := os.Open(filepath.Join(folder, m.RowsFile))
		if err != nil {
			panic(err)
		}
		p.derived = bufio.NewReader(file)
	}
	p.run()
	if p.size != h.size {
		bad("size", "log/seg", "%d records, %d are signed", p.size, h.size)
	}
	if p.root() != h.root {
		bad("root", "log/checkpoint", "another root than the records have")
	}
	if ring == nil {
		r.unknown("signature: no verifier key was given")
		return
	}
	if key := verifier(ring[0]); key.Name() != m.Origin {
		bad("signature", "log/checkpoint", "origin %s", m.Origin)
	}
	e := align(ring, p.rotations)
	checkHeads(p, e, h)
	if p.previous != nil && memory != "" && p.previous.origin != m.Origin {
		sum := sha256.Sum256([]byte(p.previous.origin))
		if path := filepath.Join(memory, hex.EncodeToString(sum[:8])) + ".head"; exists(path) {
			anchors = append(anchors, readAnchors([]string{path}, r)...)
		}
	}
	for _, a := range anchors {
		if a.agrees(p, e, r) {
			r.Anchors++
			if a.head.size > r.Anchored {
				r.Anchored = a.head.size
			}
		}
	}
	r.Root = m.Root
	r.Notes = append(r.Notes, p.notes...)
	doubts := 0
	for _, each := range r.Unknown {
		if !strings.HasPrefix(each, "lost records") {
			doubts++
		}
	}
	if memory != "" && doubts == 0 && exportKey != nil {
		if err := store(base, m); err != nil {
			panic(err)
		}
		r.Stored = true
	}
	if r.Anchors == 0 {
		r.unknown("anchor: no outside head to compare this log with")
	}
}

func guarded(r *result, act func()) {
	defer func() {
		switch found := recover().(type) {
		case nil:
		case tampered:
			r.Tampered = append(r.Tampered, found.text)
		case runtime.Error:
			r.Tampered = append(r.Tampered, "record: of a form that no writer makes ("+found.Error()+")")
		case error:
			if errors.Is(found, fs.ErrNotExist) { // an export is whole, or it is none
				r.Tampered = append(r.Tampered, "files: "+found.Error())
				return
			}
			r.unknown("read: %v", found)
		}
	}()
	act()
}

func usage(format string, args ...interface{}) {
	fmt.Fprintf(os.Stderr, "usage: verify_export EXPORT --vkey FILE [--export-key FILE] [--anchors PATH]... [--memory DIR] [--json]\n"+format+"\n", args...)
	os.Exit(2)
}

func main() {
	var folder, memory string
	var ring, paths []string
	var exportKey []byte
	asJSON := false
	args := os.Args[1:]
	for i := 0; i < len(args); i++ {
		option := args[i]
		if option == "--json" {
			asJSON = true
			continue
		}
		if !strings.HasPrefix(option, "--") {
			if folder != "" {
				usage("more than one folder")
			}
			folder = option
			continue
		}
		if i++; i == len(args) {
			usage("%s needs a value", option)
		}
		var err error
		var content []byte
		switch option {
		case "--vkey":
			content, err = os.ReadFile(args[i])
			for _, line := range strings.Split(string(content), "\n") {
				if line != "" {
					if _, wrong := note.NewVerifier(line); wrong != nil {
						err = wrong
					}
					ring = append(ring, line)
				}
			}
		case "--export-key":
			exportKey, err = os.ReadFile(args[i])
		case "--anchors":
			paths = append(paths, args[i])
		case "--memory":
			memory = args[i]
		default:
			usage("unknown option %s", option)
		}
		if err != nil {
			usage("%v", err)
		}
	}
	if info, err := os.Stat(folder); err != nil || !info.IsDir() {
		usage("no folder %q", folder)
	}
	r := &result{Unknown: []string{}, Notes: []string{}, Tampered: []string{}}
	guarded(r, func() { judge(folder, ring, exportKey, paths, memory, r) })
	r.Verdict, r.Code, r.Exit = "good", "", 0
	if len(r.Tampered) > 0 {
		r.Verdict, r.Code, r.Exit = "tampered", "audit.tampered", 1
	} else if len(r.Unknown) > 0 {
		r.Verdict, r.Code, r.Exit = "cannot tell", "audit.unknown", 3
	}
	if asJSON {
		document, _ := json.MarshalIndent(r, "", " ")
		fmt.Println(string(document))
	} else {
		fmt.Printf("%s: %s, %d records, export %d, anchored to %d by %d\n", r.Verdict, r.Origin, r.Size, r.Number, r.Anchored, r.Anchors)
		if r.Stored {
			fmt.Println("remembered in", memory)
		}
		for _, each := range r.Tampered {
			fmt.Println("tampered:", each)
		}
		for _, each := range r.Unknown {
			fmt.Println("cannot tell:", each)
		}
		for _, each := range r.Notes {
			fmt.Println("notes:", each)
		}
	}
	os.Exit(r.Exit)
}
