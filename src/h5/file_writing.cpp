#include <algorithm>

#include "disk_space.hpp"
#include "file_state.hpp"
#include "selm/comm/agree.hpp"

namespace selm::h5 {

namespace {

constexpr std::int64_t transfer_bytes = std::int64_t{256} << 20; // MPI-IO counts are ints: stay far below 2 GiB
constexpr std::int64_t write_back_bytes = std::int64_t{16} << 20; // the disk takes large datasets while others are written
constexpr std::int64_t copy_bytes = std::int64_t{32} << 20;

} // namespace

void File::create_group(const std::string& path)
{
    SELM_EXPECT(state_->comm != nullptr);
    if (path == "/" || state_->link_exists(path))
        return;
    create_group(parent_of(path));
    state_->reserve(0);
    state_->together("HDF5 group", [&] {
        const Id group(H5Gcreate2(state_->file.get(), path.c_str(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT), H5Gclose);
        if (!group.valid())
            state_->fail("creating group " + path);
    });
}

void File::create_dataset(const std::string& path, ElementType type, const std::vector<std::int64_t>& shape)
{
    SELM_EXPECT(state_->comm != nullptr && !shape.empty());
    create_group(parent_of(path));
    const std::int64_t elements = DatasetInfo{.type = type, .shape = shape}.elements();
    state_->reserve(elements * static_cast<std::int64_t>(bytes_of(type)));
    state_->together("HDF5 dataset", [&] {
        const std::vector<hsize_t> extent = dimensions(shape);
        const Id space(H5Screate_simple(static_cast<int>(extent.size()), extent.data(), nullptr), H5Sclose);
        const Id creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
        H5Pset_fill_time(creation.get(), H5D_FILL_TIME_NEVER); // every element is written
        H5Pset_alloc_time(creation.get(), H5D_ALLOC_TIME_EARLY);
        H5Pset_obj_track_times(creation.get(), false);
        Id dataset(H5Dcreate2(state_->file.get(), path.c_str(), stored_type(type), space.get(), H5P_DEFAULT, creation.get(),
                              H5P_DEFAULT), H5Dclose);
        if (!dataset.valid())
            state_->fail("creating dataset " + path);
    });
}

void File::write_from(const std::string& path, ElementType type, std::int64_t first_row, std::int64_t elements, const void* values)
{
    SELM_EXPECT(state_->comm != nullptr);
    State& state = *state_;
    State::OpenDataset target = state.open_dataset(path); // not cached: thousands may be written once each
    const std::int64_t width = target.info.row_elements();
    std::int64_t rows = 0;
    state.together("HDF5 slab", [&] {
        SELM_EXPECT(target.info.type == type);
        rows = width == 0 ? 0 : elements / width;
        SELM_EXPECT(rows * width == elements);
        SELM_EXPECT(rows == 0 || (first_row >= 0 && first_row + rows <= target.info.rows()));
    });
    if (target.info.elements() == 0)
        return;
    const auto row_bytes = width * static_cast<std::int64_t>(bytes_of(type));
    const std::int64_t rows_per_round = std::max<std::int64_t>(1, transfer_bytes / row_bytes);
    std::int64_t rounds = (rows + rows_per_round - 1) / rows_per_round;
    if (state.parallel())
        rounds = all_reduce_value(*state.comm, rounds, ReduceOp::max, "HDF5 transfer rounds");
    for (std::int64_t round = 0; round < rounds; ++round) {
        const std::int64_t begin = std::min(rows, round * rows_per_round);
        const std::int64_t count = std::min(rows - begin, rows_per_round);
        const char* data = static_cast<const char*>(values);
        state.write_round(path, target, first_row + begin, count, count > 0 ? data + begin * row_bytes : nullptr);
    }
    if (state.comm->is_root() && target.info.elements() * static_cast<std::int64_t>(bytes_of(type)) >= write_back_bytes)
        start_writing_back(state.path);
}

void File::write_blocks_from(const std::string& path, ElementType type, std::int64_t elements, const void* values,
                             const std::vector<std::int64_t>& row_shape)
{
    SELM_EXPECT(state_->comm != nullptr);
    std::int64_t width = 1;
    for (const std::int64_t extent : row_shape)
        width *= extent;
    state_->together("HDF5 blocks", [&] { SELM_EXPECT(width > 0 && elements % width == 0); });
    const std::int64_t rows = elements / width;
    const std::vector<std::int64_t> all = all_gather_value(*state_->comm, rows, "HDF5 block sizes");
    std::int64_t first = 0;
    std::int64_t total = 0;
    for (std::size_t rank = 0; rank < all.size(); ++rank) {
        if (static_cast<int>(rank) < state_->comm->rank())
            first += all[rank];
        total += all[rank];
    }
    std::vector<std::int64_t> shape{total};
    shape.insert(shape.end(), row_shape.begin(), row_shape.end());
    create_dataset(path, type, shape);
    write_from(path, type, first, elements, values);
}

void File::write_offsets(const std::string& path, std::span<const std::int64_t> lengths)
{
    std::int64_t mine = 0;
    for (const std::int64_t length : lengths)
        mine += length;
    const std::vector<std::int64_t> all = all_gather_value(*state_->comm, mine, "HDF5 ragged sizes");
    std::int64_t next = 0;
    for (int rank = 0; rank < state_->comm->rank(); ++rank)
        next += all[static_cast<std::size_t>(rank)];
    std::vector<std::int64_t> offsets;
    offsets.reserve(lengths.size() + 1);
    for (const std::int64_t length : lengths) {
        offsets.push_back(next);
        next += length;
    }
    if (state_->comm->rank() == state_->comm->size() - 1)
        offsets.push_back(next);
    write_blocks(path, offsets);
}

void File::write_texts(const std::string& path, std::span<const std::string> mine)
{
    std::vector<std::int64_t> lengths;
    lengths.reserve(mine.size());
    std::string joined;
    for (const std::string& text : mine) {
        lengths.push_back(static_cast<std::int64_t>(text.size()));
        joined += text;
    }
    write_blocks(path, std::span(reinterpret_cast<const std::uint8_t*>(joined.data()), joined.size()));
    write_offsets(path + "_offsets", lengths);
}

// ---------------------------------------------------------------------------------------------------- copying

namespace {

void copy_dataset(const File& source, File& target, const std::string& path, Communicator& comm)
{
    DatasetInfo info;
    agree(comm, "dataset to be copied", [&] { info = source.info(path); });
    target.create_dataset(path, info.type, info.shape);
    const std::int64_t row_bytes = info.row_elements() * static_cast<std::int64_t>(bytes_of(info.type));
    if (row_bytes == 0)
        return;
    const std::int64_t rows_per_round = std::max<std::int64_t>(1, copy_bytes / row_bytes);
    const std::int64_t stride = rows_per_round * comm.size(); // rows of all ranks in one round
    std::vector<std::byte> buffer;
    for (std::int64_t begin = 0; begin < info.rows(); begin += stride) {
        const std::int64_t first = std::min(info.rows(), begin + rows_per_round * comm.rank());
        const std::int64_t count = std::min(rows_per_round, info.rows() - first);
        agree(comm, "reading the file to be copied", [&] {
            buffer.resize(static_cast<std::size_t>(count * row_bytes));
            source.read_into(path, info.type, first, count, buffer.data());
        });
        const auto write = [&]<typename T>(T) {
            target.write_slab(path, first, std::span(reinterpret_cast<const T*>(buffer.data()), buffer.size() / sizeof(T)));
        };
        switch (info.type) {
        case ElementType::uint8: write(std::uint8_t{}); break;
        case ElementType::int32: write(std::int32_t{}); break;
        case ElementType::int64: write(std::int64_t{}); break;
        case ElementType::float32: write(float{}); break;
        case ElementType::float64: write(double{}); break;
        }
    }
}

} // namespace

void File::copy_tree(const File& source, const std::string& path, const std::vector<std::string>& except)
{
    SELM_EXPECT(state_->comm != nullptr);
    if (std::find(except.begin(), except.end(), path) != except.end())
        return;
    bool group = false;
    Attributes attributes;
    std::vector<std::string> names;
    agree(*state_->comm, "object to be copied", [&] {
        group = source.is_group(path);
        attributes = source.attributes(path);
        if (group)
            names = source.children(path);
    });
    if (group)
        create_group(path);
    else
        copy_dataset(source, *this, path, *state_->comm);
    set_attributes(path, attributes);
    for (const std::string& name : names)
        copy_tree(source, join(path, name), except);
}

} // namespace selm::h5
